"""`llava-mini convert`: a model folder in another format, or a training run's starting point.

SRC (a published model, methods.py) -------------------.
--vision FOLDER --llm FOLDER + fresh parts --lazy leaves--+--one tensor at a time--> DST
"""

import argparse
from pathlib import Path
from typing import Any

from llava_mini_jax.arguments import COMPRESSOR, VISION_TOWER, refuse
from llava_mini_jax.errors import InputError
from llava_mini_jax.terminal import human_bytes, note, tensor_progress, waiting

SUMMARY = "convert a model folder to another format, or create a training run's starting point"
USAGE = """llava-mini convert SRC DST [options]
       llava-mini convert --vision FOLDER --llm FOLDER DST [options]"""
EXAMPLE = """examples:
  llava-mini convert llava-v1.5-7b llava-hf-7b --format llava-hf
  llava-mini convert out/stage2/model whole --merge
  llava-mini convert llava-v1.5-7b visionzip-7b --compressor visionzip,dominant=54
  llava-mini convert --vision clip-vit-large-patch14-336 --llm vicuna-7b-v1.5 start --grid 2"""

PARTS_OPTIONS = ("dialect", "grid", "prefusion_layers", "prefusion_init", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "folders",
        nargs="+",
        metavar="FOLDER",
        help="the model folder (or hub name), then the new folder",
    )
    add("--format", default="release", help="release (default), llava-1.5 or llava-hf")
    add("--dtype", metavar="TYPE", help="float32, bfloat16 or float16 (default: unchanged)")
    add("--vision-tower", metavar="FOLDER", help=VISION_TOWER)
    add("--merge", action="store_true", help="merge the LoRA adapter FOLDER into its base")
    add("--compressor", metavar="NAME[,FIELD=VALUE...]", help=COMPRESSOR)
    add("--base", metavar="FOLDER", help="the adapter's base (default: the one it names)")
    parts = parser.add_argument_group("a training run's starting point")
    add = parts.add_argument
    add("--vision", "--clip", metavar="FOLDER", help="the tower's folder: CLIP's or SigLIP's")
    add("--llm", metavar="FOLDER", help="the language model's folder (docs/weights.md: families)")
    add("--dialect", help="paper or release (default: paper)")
    add("--grid", type=int, metavar="C", help="C*C tokens an image (default: 1)")
    add("--prefusion-layers", type=int, metavar="N", help="default: 4")
    add("--prefusion-init", metavar="HOW", help="fresh (default), or copy: the LLM's first layers")
    add("--seed", type=int, metavar="S", help="seed of new parameters (default: 0)")


def run(args: argparse.Namespace) -> int:
    _check(args)
    target = Path(args.folders[-1])
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists and is not empty: choose another output folder")
    # Behind the checks: JAX takes a while to import, and wrong options are told at once.
    with waiting("starting"):
        import jax
        from safetensors import SafetensorError

        from llava_mini_jax.config import FLOAT_DTYPES, NARROW_DTYPES
        from llava_mini_jax.weights import adapters
        from llava_mini_jax.weights.export_hf import export_model
        from llava_mini_jax.weights.hf_prompt import template_told
        from llava_mini_jax.weights.hub import resolve_folder

    if args.dtype is not None and args.dtype not in FLOAT_DTYPES:
        hint = f"; weights become {args.dtype} as they are loaded: ask --dtype {args.dtype}"
        raise InputError(
            f'dtype "{args.dtype}" cannot be used for a folder; use one of'
            f" {', '.join(FLOAT_DTYPES)}{hint if args.dtype in NARROW_DTYPES else ''}"
        )
    source = resolve_folder(args.llm or args.folders[0])
    base = None if args.base is None else resolve_folder(args.base)
    with tensor_progress() as bar:
        bundle, params = _open(args, source, base, bar.step)
        leaves = jax.tree.leaves(params)
        bar.expect(len(leaves), sum(leaf.nbytes for leaf in leaves))
        try:
            tokenizer = adapters.tokenizer_folder(source, base)
            export_model(params, bundle, target, format=args.format, copy_from=tokenizer)
        except SafetensorError as error:  # how that library reports a full disk
            raise InputError(f"{target} cannot be written ({error}): free some space") from error
    # Told to files and pipes too where it was chosen here, and not known of a LLaVA of Vicuna.
    tell = note if args.vision is None and bundle.prompt.template == "vicuna_v1" else print
    tell(template_told(bundle, adapters.described(source, base), llava=args.vision is None))
    note(f"{target}: {bar.tensors} parameters, {human_bytes(bar.nbytes)}")
    return 0


def _check(args: argparse.Namespace) -> None:
    from_parts = args.vision is not None or args.llm is not None
    if from_parts and (args.vision is None or args.llm is None):
        raise InputError("--vision and --llm belong together: give both folders")
    wanted = 1 if from_parts else 2
    if len(args.folders) != wanted:
        raise InputError(
            f"{len(args.folders)} folders are given ({', '.join(args.folders)}), expected"
            f" {'only DST with --vision and --llm' if from_parts else 'SRC and DST'}"
        )
    if not from_parts:
        refuse(args, PARTS_OPTIONS, "without --vision and --llm")
        if not args.merge:
            refuse(args, ["base"], "without --merge")
    if from_parts:
        refuse(args, ["vision_tower"], "with --vision, which names the tower")
        refuse(
            args, ["merge", "base"], "with --vision and --llm: --merge is for an adapter's folder"
        )
        refuse(args, ["compressor"], "with --vision and --llm, whose model is a new one")
    if args.prefusion_layers == 0:
        refuse(args, ["prefusion_init"], "with --prefusion-layers 0")


def _open(args: argparse.Namespace, source: Path, base: Path | None, watch: Any) -> tuple[Any, Any]:
    from llava_mini_jax.weights import adapters, lazy_params, methods
    from llava_mini_jax.weights.hub import resolve_folder

    if args.vision is None:
        tower = None if args.vision_tower is None else Path(args.vision_tower)
        if args.merge and not adapters.is_adapter(source):
            raise InputError(f"{source} is not an adapter: leave out --merge")
        if adapters.is_adapter(source) and not args.merge:
            raise InputError(f"{source} is a LoRA adapter: give --merge to write it and its base "
                             "as one model, which may need many gigabytes")  # fmt: skip
        asked = None if args.compressor is None else methods.parse_asked(args.compressor)
        return lazy_params.open_for_export(
            source,
            vision_tower=tower,
            base=base,
            compressor=asked,
            dtype=args.dtype,
            watch=watch,
        )
    return lazy_params.start_from_parts(
        resolve_folder(args.vision),
        source,
        dialect=args.dialect or "paper",
        grid=1 if args.grid is None else args.grid,
        prefusion_layers=4 if args.prefusion_layers is None else args.prefusion_layers,
        prefusion_init=args.prefusion_init or "fresh",
        seed=args.seed or 0,
        dtype=args.dtype,
        watch=watch,
    )
