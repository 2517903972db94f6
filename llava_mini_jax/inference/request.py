"""Requests: what a caller gives, prompts and images, as the examples that a model reads.

images, videos --read_pictures--> Pictures (uint8 parts, frames of each "<image>")
prompt (text, or Turns) --open_turns--> Turns with their "<image>"s, the assistant's open
                               |
              make_request --> Example, checked: marks fit images, input fits the model
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_mini_jax.config import Bundle
from llava_mini_jax.data.batches.examples import Example, make_example
from llava_mini_jax.data.media.image_file import load_image
from llava_mini_jax.data.media.images import ImageConfig, preprocess
from llava_mini_jax.data.media.video import FrameSampling, preprocess_frames, read_video
from llava_mini_jax.data.text.conversation import (
    IMAGE_MARK,
    EncodedPrompt,
    Turn,
    check_images,
    encode,
)
from llava_mini_jax.data.text.templates import image_marks
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference.prompt_template import template_of
from llava_mini_jax.inference.vision_tokens import VisionTokens, chosen

Picture = Path | str | bytes | Image.Image | np.ndarray
Video = Path | str | np.ndarray
Prompt = str | Sequence[Turn]

PICTURE = "a path, the bytes of a file, a Pillow image, or a uint8 array [height, width, 3]"
VIDEO = "a path, or uint8 frames [frames, height, width, 3]"
ONE_A_SECOND = FrameSampling(fps=1.0)


@dataclass(frozen=True)
class Pictures:
    """A prompt's images and videos as the model reads them: images first, then videos."""

    pixels: np.ndarray  # [I, J, Y, X, C], uint8, or float32 if already normalised
    frames: tuple[int, ...]  # of each image (1) and video (F); their sum is I


def refuse_videos(bundle: Bundle) -> None:
    """InputError for a video where the model's compressor is defined on images alone."""
    if not bundle.model.declared.videos:
        raise InputError(
            f'compressor "{bundle.model.compressor.kind}" is defined on images, and a video is'
            " given; give its frames as images"
        )


def read_pictures(
    images: Picture | Sequence[Picture] | None,
    videos: Video | Sequence[Video] | None,
    bundle: Bundle,
    sampling: FrameSampling | None = None,
) -> Pictures:
    """Images of one prompt; without a `sampling`, videos are read as `sampling_for` says.

    An image is a path, the bytes of a file, a Pillow image, or uint8 [H, W, 3]; a video is the
    path of a file or of a folder of images, or its frames, uint8 [F, H, W, 3]. One alone needs
    no list. Raises InputError for what cannot be read.
    """
    cfg, sampling = bundle.images, sampling or sampling_for(bundle)
    shown = [_image(image, cfg) for image in _listed(images, Picture, "images", PICTURE)]
    films = _listed(videos, Video, "videos", VIDEO)
    if films:
        refuse_videos(bundle)
    shown += [_video(video, cfg, sampling) for video in films]
    # In front of the others: a prompt without images has a shape, too.
    none = np.zeros((0, cfg.parts, cfg.size, cfg.size, 3), np.uint8)
    return Pictures(np.concatenate([none, *shown]), tuple(len(parts) for parts in shown))


def _listed(given: Any, kinds: Any, name: str, expected: str) -> list[Any]:
    if given is None:
        return []
    if isinstance(given, kinds):
        return [given]
    content = isinstance(given, bytes | bytearray | memoryview)
    if content or not isinstance(given, Sequence | Iterator):
        raise InputError(f"{name} is {_shown(given)}; give {expected}, or a list of these")
    return list(given)


def _shown(given: Any) -> str:
    """What a caller gave: its value where that is short, and its type."""
    kind = given.__name__ if isinstance(given, type) else type(given).__name__
    return f"{given!r:.60} ({kind})" if isinstance(given, str | int | float | None) else kind


def _image(source: Picture, cfg: ImageConfig) -> np.ndarray:
    if isinstance(source, np.ndarray):
        check_frame(source, "image")
        source = Image.fromarray(source)
    check_kind(source, Picture, "an image", PICTURE)
    return preprocess(load_image(source), cfg)[None]


def _video(source: Video, cfg: ImageConfig, sampling: FrameSampling) -> np.ndarray:
    check_video(source)
    if isinstance(source, Path | str):
        frames = read_video(source, sampling)
        return preprocess_frames(frames, cfg, resize=resize_of(source, sampling))
    return preprocess_frames(source, cfg, resize="bicubic")


def check_video(source: Any) -> None:
    """Raises InputError unless it is a path, or frames as `read_pictures` takes them."""
    check_kind(source, Video, "a video", VIDEO)
    if isinstance(source, np.ndarray):
        if source.ndim != 4:
            given = f"{source.dtype} {list(source.shape)}"
            raise InputError(f"a video is the array {given:.80}; give {VIDEO}")
        for frame in source:
            check_frame(frame, "frame of a video")


def check_kind(source: Any, kinds: Any, name: str, expected: str) -> None:
    """Raises InputError unless `source` is one of the kinds."""
    if not isinstance(source, kinds):
        raise InputError(f"{name} is given as {_shown(source)}; give {expected}")


def sampling_for(
    bundle: Bundle, *, fps: float = 1.0, max_frames: int | None = None
) -> FrameSampling:
    """Frames by time; chosen as the release chooses them for weights of its dialect.

    What is taken wherever a caller gives no sampling of its own.
    """
    # What the compressor reads tells the dialect that weights are of.
    rule = "release" if bundle.model.compress == "features" else "time_stamps"
    return FrameSampling(fps=fps, max_frames=max_frames, rule=rule)


def resize_of(source: Path | str, sampling: FrameSampling) -> str:
    """How frames are made small: the release squeezes those of a file, a folder's are images."""
    squeezed = sampling.rule == "release" and not Path(source).is_dir()
    return "nearest" if squeezed else "bicubic"


def check_frame(frame: Any, what: str) -> None:
    """Raises InputError unless `frame` is uint8 [height, width, 3]."""
    is_array = isinstance(frame, np.ndarray) and frame.dtype == np.uint8
    if not is_array or frame.shape[2:] != (3,) or not frame.size:
        given = (
            f"{frame.dtype} {list(frame.shape)}" if isinstance(frame, np.ndarray) else repr(frame)
        )
        raise InputError(
            f"a {what} is the array {given:.80}; give uint8 [height, width, 3], red, green, blue"
        )


def open_turns(prompt: Prompt, pictures: int, where: str) -> list[Turn]:
    """A prompt as turns that wait for the assistant.

    Text is one turn of the user. Where no turn has an "<image>", one for each image or video is
    put in front of the first, each on a line of its own.
    """
    given = [Turn("user", prompt)] if isinstance(prompt, str) else prompt
    turns = list(given) if isinstance(given, Sequence) else []
    if not turns or not all(isinstance(turn, Turn) for turn in turns):
        raise InputError(f"{where} is {_shown(prompt)}; give text, or a list of Turns")
    for turn in turns:
        if turn.role not in ("user", "assistant") or not isinstance(turn.text, str | None):
            raise InputError(
                f'{where} has the turn {turn!r:.80}; its role is "user" or "assistant", its text a'
                " string (None for an open turn of the assistant, at the end)"
            )
    if turns[-1].role == "user":
        turns.append(Turn("assistant", None))
    if turns[-1].text is not None:
        raise InputError(f"{where} ends with an answer; end with the user's turn, or an open one")
    if pictures and not any(map(image_marks, turns)):
        each = f"{IMAGE_MARK}\n"
        marks = tuple(i * len(each) for i in range(pictures))
        turns[0] = replace(turns[0], text=each * pictures + (turns[0].text or ""), marks=marks)
    return turns


def make_request(
    prompt: Prompt,
    pictures: Pictures,
    bundle: Bundle,
    tokenizer: Any,
    where: str = "the prompt",
    vision_tokens: VisionTokens = None,
) -> Example:
    """The example of one prompt; `where` names it in errors.

    Raises InputError for more or fewer "<image>" than images, for turns out of order, and for
    `vision_tokens` that the model does not have (vision_tokens.py).
    """
    tokens = chosen(vision_tokens, bundle)
    turns = open_turns(prompt, len(pictures.frames), where)
    encoded = encode_turns(turns, len(pictures.frames), bundle, tokenizer, where)
    pixels = pictures.pixels
    if not len(pixels) and bundle.prompt.blank_image:
        pixels = blank_image(bundle.images)
    return make_example(
        encoded, pixels, pictures.frames, bundle.prompt, training=False, tokens=tokens
    )


def blank_image(cfg: ImageConfig) -> np.ndarray:
    """float32 [1, J, Y, X, C]: what the release's training fuses text without an image with.

    Normalised zeros, which no uint8 image is exactly (docs/release.md, "Splice").
    """
    return np.zeros((1, cfg.parts, cfg.size, cfg.size, 3), np.float32)


def encode_turns(
    turns: Sequence[Turn], pictures: int, bundle: Bundle, tokenizer: Any, where: str
) -> EncodedPrompt:
    """The ids of a conversation, checked against the images and the model's vocabulary."""
    _check_unicode(turns, where)
    prompt = bundle.prompt
    encoded = encode(
        template_of(bundle), turns, tokenizer, double_bos=prompt.double_bos, date=prompt.date
    )
    check_images(encoded, pictures, where)
    if not len(encoded.ids):
        raise InputError(f"{where} has no tokens; give it some text, or an image")
    if len(encoded.ids) and encoded.ids.max() >= bundle.model.llm.vocab_size:
        raise InputError(
            f"{where} has the token id {encoded.ids.max()}, but the model knows"
            f" {bundle.model.llm.vocab_size} tokens; use the tokenizer of these weights"
        )
    return encoded


def _check_unicode(turns: Sequence[Turn], where: str) -> None:
    for turn in turns:
        try:
            (turn.text or "").encode()
        except UnicodeEncodeError as error:  # what Python makes of bytes that are not UTF-8
            raise InputError(
                f"{where} has {error.object[error.start]!r} at character {error.start + 1}, which"
                " is not a Unicode character; give UTF-8 text"
            ) from error
