"""A row of a data file as a sample in LLaVA's form, and what is told of it without its media.

    {"image" | "images" | "video" | "video_id", "conversations" | "messages" | "q", "a"}
        --media, conversations--> {"image" | "frames" | neither, "conversations": LLaVA's turns}
        --group-----------------> modality, words
        --named-----------------> the path of its image or video, for those who only measure it

Rows that are no sample raise InputError; what is wrong inside of a conversation is for
`conversation.from_llava` to say.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from llava_mini_jax.data.media.video import FrameSampling, read_video
from llava_mini_jax.data.sample import Media
from llava_mini_jax.data.sets import messages
from llava_mini_jax.data.sets.arrayrecord import PackedVideo
from llava_mini_jax.data.sets.media_places import Place
from llava_mini_jax.data.sets.order import MODALITIES
from llava_mini_jax.data.text.conversation import IMAGE_MARK
from llava_mini_jax.errors import InputError

VIDEO_MARK = "<video>"  # of Video-ChatGPT's conversations, where LLaVA writes "<image>"
SAID = ("conversations", "messages", "q")
MEDIA = ("image", "images", "video")
# Fields that other toolkits' models read, or learn, and this package does not.
UNREAD = (
    *("system", "tools", "prompt", "completion", "chosen", "rejected", "texts"),
    *("videos", "audio", "audios"),
)
COLUMNS = ("id", *MEDIA, "video_id", *SAID, "a", *UNREAD)


@dataclasses.dataclass(frozen=True)
class Frames:
    """The frames of a video, uint8 [H, W, 3] each, decoded one by one whenever they are iterated.

    Not an array: an hour of video would be gigabytes before it is made small.
    """

    video: str | PackedVideo  # a path, or bytes
    sampling: FrameSampling
    place: str  # of the sample

    def __iter__(self) -> Iterator[np.ndarray]:
        if isinstance(self.video, str):
            return read_video(self.video, self.sampling)
        return self._unpacked(self.video)

    def _unpacked(self, video: PackedVideo) -> Iterator[np.ndarray]:
        with video.unpacked(self.place) as path:
            yield from read_video(path, self.sampling)


def media(fields: dict[str, Any], images: Place, sampling: FrameSampling, place: str) -> Media:
    """{"image": a path or bytes}, {"frames": Frames}, or {} of a row of text."""
    if unread := [name for name in UNREAD if fields.get(name) not in (None, "", [], {})]:
        raise InputError(
            f"{place} has {' and '.join(map(repr, unread))}, which training does not read; remove"
            " the field, or the sample."
        )
    for key, value in _given(fields, place).items():
        if isinstance(value, PackedVideo):
            return {"frames": Frames(value, sampling, place)}
        if isinstance(value, bytes) and key.startswith("image"):
            return {"image": value}
        if not isinstance(value, str):
            raise InputError(
                f'{place}: its "{key}" is {value!r:.60}; expected a path relative to'
                f" {images}. Correct or remove the sample."
            )
        if key.startswith("image"):
            return {"image": images.picture(value, place)}
        return {"frames": Frames(images.video(value, place), sampling, place)}
    return {}


def named(fields: dict[str, Any]) -> tuple[str, bool] | None:
    """(path, whether it is a video's) of what a row shows; None where nothing has a path."""
    for key, value in _given(fields, "").items():
        if isinstance(value, str):
            return value, not key.startswith("image")
    return None


def group(fields: Any) -> tuple[int, int]:
    """Modality (index into MODALITIES) and words of a row; what is no sample is text of no words.

    The words are the whole conversation's, which is how LLaVA estimates lengths. Its 128 for an
    image is left out: inside a modality it is the same for all. How many frames a video will
    have is not known before it is opened.
    """
    text = MODALITIES.index("text")
    if not isinstance(fields, dict):
        return text, 0
    try:
        given, turns = _given(fields, ""), conversations(fields, False, "")
    except InputError:
        return text, 0
    modality = "video" if {"video", "video_id"} & given.keys() else "image" if given else "text"
    turns = turns if isinstance(turns, list) else []
    said = (turn.get("value") for turn in turns if isinstance(turn, dict))
    words = sum(len(value.split()) for value in said if isinstance(value, str))
    return MODALITIES.index(modality), words


def _given(fields: dict[str, Any], place: str) -> dict[str, Any]:
    """The one image or video of a row, under its key."""
    keys = ("image", "images", "video", *["video_id"] * ("q" in fields))
    given = {key: found for key in keys if (found := _single(fields, key, place)) is not None}
    if len(given) > 1:
        raise InputError(
            f"{place} has {' and '.join(given)}; a sample has one image or one video. Remove"
            " what does not belong to it."
        )
    return given


def _single(fields: dict[str, Any], key: str, place: str) -> Any:
    """The one image or video under `key`: a path, bytes, or None where there is none."""
    value = fields.get(key)
    if isinstance(value, list):
        if len(value) > 1:
            raise InputError(
                f'{place}: its "{key}" are {len(value)}; training takes one image or video a'
                " sample. Split or remove the sample."
            )
        value = value[0] if value else None
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:  # of the Hugging Face hub
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    return None if value == "" else value


def conversations(fields: dict[str, Any], is_video: bool, place: str) -> Any:
    """LLaVA's list of turns; what is wrong inside of it is for `from_llava` to say."""
    given = [key for key in ("conversations", "messages") if fields.get(key) is not None]
    if len(given) > 1:
        raise InputError(f"{place} has conversations and messages; remove one of them.")
    if given or "conversations" in fields:
        turns = fields[given[0]] if given else None
        if isinstance(turns, list) and messages.is_chat(turns):
            turns = messages.turns_of(turns, place)
    elif isinstance(fields.get("q"), str) and isinstance(fields.get("a"), str):
        question = f"{IMAGE_MARK}\n{fields['q']}" if is_video else fields["q"]
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": fields["a"]}]
    else:
        raise InputError(
            f'{place} has no "conversations" or "messages" (nor texts "q" and "a"), but'
            f" {', '.join(map(repr, fields))[:80] or 'nothing'}; correct or remove it."
        )
    if not isinstance(turns, list):
        return turns
    checked = []
    for turn in turns:
        text = turn.get("value") if isinstance(turn, dict) else None
        if isinstance(text, str):
            try:
                text.encode()
            except UnicodeEncodeError as error:  # JSON can write halves of letters: "\ud800"
                raise InputError(
                    f"{place}: a turn has half of a surrogate pair ({error.reason}), which no"
                    " tokenizer reads; correct or remove the sample."
                ) from error
            if is_video:
                turn = {**turn, "value": text.replace(VIDEO_MARK, IMAGE_MARK)}
        checked.append(turn)
    return checked
