"""A sample in LLaVA's form: what data sets and the digits world give, and training encodes."""

from typing import Any, NotRequired, TypedDict


class Media(TypedDict):
    """The one image or video of a sample; neither, where it is text."""

    image: NotRequired[Any]  # the path or the bytes of a file, or uint8 [H, W, 3]
    frames: NotRequired[Any]  # uint8 [H, W, 3] each: an array, or what decodes them one by one


class Sample(Media):
    """One conversation. A plain dict, so that a source of your own need not import anything."""

    id: str | int
    conversations: list[Any]  # {"from": "human" or "gpt", "value": text}, checked when encoded
    kind: NotRequired[str]  # for people: the data set's name, or the kinds of its questions
