"""`llava-mini ask`: one question, or a conversation, about images, videos, or text alone.

files, urls, stdin --ask_given.py--> images, seen once --> Session --question--> ask_answers.py
                                                                ^                         |
                       the answer to stdout, or -n of them      '--- -i: the next one ----'
"""

import argparse
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llava_mini_jax.arguments import (
    COMPRESSOR,
    JSON,
    VISION_TOKENS,
    VISION_TOWER,
    refuse,
    vision_tokens,
)
from llava_mini_jax.cli import ask_answers
from llava_mini_jax.cli.ask_given import STDIN, Given
from llava_mini_jax.errors import InputError
from llava_mini_jax.terminal import loading, print_json, waiting, watching

if TYPE_CHECKING:
    from llava_mini_jax.cost.video_plan import Plan
    from llava_mini_jax.data.media.video import FrameSampling
    from llava_mini_jax.inference.model import Model, Settings
    from llava_mini_jax.inference.opening import Opened
    from llava_mini_jax.inference.session import Session
    from llava_mini_jax.inference.shelf import Budget
    from llava_mini_jax.inference.warm_up import WarmUp

SUMMARY = "answer a question about images, videos, or text alone"
USAGE = "llava-mini ask MODEL [--image FILE]... [--video FILE]... [options] [QUESTION]"
EXAMPLE = """examples:
  llava-mini ask MODEL --image cat.jpg "What is this?"
  llava-mini ask MODEL --image a.png --image b.png "What differs between <image> and <image>?"
  llava-mini ask MODEL --image https://example.org/cat.jpg --json "What is this?"
  llava-mini ask MODEL --video clip.mp4 -i"""

SAMPLING = ("top_p", "top_k", "seed")
FPS = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="model folder, or a name on the Hugging Face hub")
    add(
        "question",
        nargs="?",
        metavar="QUESTION",
        help='"<image>" in it marks the place of an image (default: before the text)',
    )
    add(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="an image, its URL, or - for stdin; repeatable",
    )
    add(
        "--video",
        action="append",
        default=[],
        metavar="FILE",
        help="a video, its URL, or a folder of its frames; repeatable; comes after the images",
    )
    add("--fps", type=float, metavar="F", help="video frames to read a second; default: 1")
    add("--max-frames", type=int, metavar="N", help="most frames of a video, spread evenly")
    add("--dry-run", action="store_true", help="print frames, positions and memory, then stop")
    add("-i", "--interactive", action="store_true", help="keep asking, until an empty line")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="longest answer; default: 512")
    add("--temperature", type=float, default=0.0, metavar="T", help="default: 0, greedy decoding")
    add("--top-p", type=float, metavar="P", help="default: 1, all tokens")
    add("--top-k", type=int, metavar="K", help="default: 0, all tokens")
    add("--seed", type=int, metavar="S", help="default: 0")
    add("-n", "--samples", type=int, default=1, metavar="N", help="give N answers, numbered")
    add("--json", action="store_true", help=JSON)
    add("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable")
    add("--dtype", metavar="TYPE", help="float32 (default on CPU), bfloat16; int8 or int4 weights")
    add("--attention", default="auto", metavar="NAME", help="auto (default), xla, cudnn or splash")
    add("--vision-tower", metavar="FOLDER", help=VISION_TOWER)
    add(
        "--conv-mode",
        metavar="NAME",
        help="prompt template: vicuna_v1, llama_3_1, chat, ... (default: config.json's)",
    )
    add("--compressor", metavar="NAME[,FIELD=VALUE...]", help=COMPRESSOR)
    add("--max-length", type=int, metavar="N", help="longest prompt, in positions")
    add("--vision-tokens", type=vision_tokens, metavar="N", help=VISION_TOKENS)


def run(args: argparse.Namespace) -> int:
    _check(args)
    given = Given(args.image, args.video)
    # Behind the checks: JAX takes a while to import, and wrong options are told at once.
    with waiting("starting"):
        from llava_mini_jax.data.media.video import FrameSampling
        from llava_mini_jax.inference.answer import Settings
        from llava_mini_jax.inference.request import refuse_videos

    sampling = {name: v for name in SAMPLING if (v := getattr(args, name)) is not None}
    settings = Settings(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        stop=args.stop,
        **sampling,
    )
    args.fps = FPS if args.fps is None else args.fps
    # Pillow warns of images that are merely large; load_image has a limit of its own.
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")
    with waiting("opening images and videos"):
        args.image, args.video = given.pictures(), given.films()
    _check_files(args.image, args.video, FrameSampling(fps=args.fps, max_frames=args.max_frames))
    opened = _opened(args)
    if args.video:
        refuse_videos(opened.bundle)
    if args.dry_run:
        plan = _plan(opened, args, settings)
        print_json(plan.as_json()) if args.json else print(*plan.lines(), sep="\n")
        return 0
    chat = _begun(opened, args, settings)
    if args.json:
        print_json(ask_answers.document(chat, args.question, args.samples, args.model))
    elif args.samples > 1:
        ask_answers.numbered(chat, args.question, args.samples)
    else:
        return ask_answers.talk(chat, args.question, args.interactive)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Options that mean nothing, alone or together."""
    if args.question is None and not args.interactive and not args.dry_run:
        raise InputError('no question is given; add one in quotes, or "-i" to type it')
    if not args.video:
        refuse(args, ["fps", "max_frames"], "without --video")
    if not args.temperature:
        refuse(args, SAMPLING, "at --temperature 0, the default")
    if args.samples < 1:
        raise InputError(f"-n is {args.samples}; give 1 or more answers")
    if args.samples > 1 and not args.temperature:
        raise InputError(
            f"-n is {args.samples} at --temperature 0, where all answers are the same; give"
            " --temperature above 0, or leave -n out"
        )
    if not args.interactive:
        return
    if args.samples > 1:
        given = f"-n is {args.samples}"
        raise InputError(f"{given} with -i, which continues from one answer; leave one of them out")
    if args.json and not args.dry_run:
        raise InputError("--json is one document about one question; leave out -i")
    if STDIN in args.image:
        raise InputError("--image - and -i both read standard input; give the image's path")


def _begun(opened: "Opened", args: argparse.Namespace, settings: "Settings") -> "Session":
    """The session in front of its first question: the weights read, the programs compiled."""
    from llava_mini_jax.inference.model import read

    with loading(args.model) as watch:
        programs = _warm_up(opened, args, settings)
        model = read(opened, watch)
    with watching("compiling", stays=False) as watch:
        programs.wait(watch)
    with waiting("reading images"):
        return _conversation(model, args, settings)


def _opened(args: argparse.Namespace) -> "Opened":
    from llava_mini_jax.inference.opening import open_folder

    return open_folder(
        args.model,
        dtype=args.dtype,
        attention=args.attention,
        vision_tower=args.vision_tower,
        template=args.conv_mode,
        max_length=args.max_length,
        vision_tokens=args.vision_tokens,
        compressor=args.compressor,
    )


def _asked(opened: "Opened", args: argparse.Namespace) -> tuple[int, list[int]]:
    """(ids of the question's prompt, image marks included; frames of each image and video)."""
    from llava_mini_jax.data.media.video import read_video
    from llava_mini_jax.inference import request

    bundle = opened.bundle
    sampling = request.sampling_for(bundle, fps=args.fps, max_frames=args.max_frames)
    counts = [1] * len(args.image) + [len(read_video(video, sampling)) for video in args.video]
    turns = request.open_turns(args.question or "", len(counts), "the question")
    prompt = request.encode_turns(turns, len(counts), bundle, opened.tokenizer, "the question")
    return len(prompt.ids), counts


def _plan(opened: "Opened", args: argparse.Namespace, settings: "Settings") -> "Plan":
    """What the question would take; no weights are read and no frame is decoded."""
    from llava_mini_jax import sharding
    from llava_mini_jax.cost.video_plan import plan
    from llava_mini_jax.inference.opening import computing_dtype
    from llava_mini_jax.inference.session import CHUNK

    ids, counts = _asked(opened, args)
    return plan(
        opened.bundle,
        sum(counts),
        ids - len(counts),
        dtype=args.dtype or computing_dtype(None),
        chunk=CHUNK,
        answer=settings.max_new_tokens,
        budget=_budget(args),
        in_parts=sharding.on_one_cpu(),
    )


def _warm_up(opened: "Opened", args: argparse.Namespace, settings: "Settings") -> "WarmUp":
    """The programs of the first question, which begin to be compiled."""
    from llava_mini_jax.inference import warm_up
    from llava_mini_jax.inference.session import CHUNK

    def programs(call: Callable[..., Any]) -> None:
        ids, counts = _asked(opened, args)
        warm_up.of_question(
            opened.with_shapes(),
            call,
            text=ids,
            media=counts,
            answer=settings.max_new_tokens,
            chunk=CHUNK,
            more=_goes_on(args),
        )

    return warm_up.WarmUp(programs)


def _conversation(model: "Model", args: argparse.Namespace, settings: "Settings") -> "Session":
    from llava_mini_jax.inference import request
    from llava_mini_jax.inference.session import Session

    sampling = request.sampling_for(model.bundle, fps=args.fps, max_frames=args.max_frames)
    session = Session(model, settings, budget=_budget(args))
    for image in args.image:
        session.show_image(image)
    for video in args.video:
        session.show_video(video, sampling)
    return session


def _goes_on(args: argparse.Namespace) -> bool:
    """Whether there is more than one answer."""
    return args.interactive or args.samples > 1


def _budget(args: argparse.Namespace) -> "Budget":
    """One answer alone has no use for what it leaves of the frames."""
    from llava_mini_jax.inference.shelf import Budget

    return Budget() if _goes_on(args) else Budget(host=0)


def _check_files(images: list[Any], videos: list[str], sampling: "FrameSampling") -> None:
    """Bad files are found before the weights are loaded, which may take a minute."""
    from llava_mini_jax.data.media.image_file import load_image
    from llava_mini_jax.data.media.video import read_video

    for image in images:
        load_image(image)
    for video in videos:
        next(iter(read_video(video, sampling)))
