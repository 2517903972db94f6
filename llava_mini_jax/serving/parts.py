"""What a request says of its images and films, before anything of them is read.

messages --protocol.py--> ImagePart, VideoPart, in their order --media.py--> the engine's Media
"""

from dataclasses import dataclass

DETAILS = ("auto", "low", "high", "original")


@dataclass(frozen=True)
class ImagePart:
    """An image: where it is, or the name under which it was sent before."""

    url: str | None  # data:, http(s):, file:; None: `uuid` names one that was sent before
    detail: str = "auto"  # one of DETAILS
    uuid: str | None = None


@dataclass(frozen=True)
class VideoPart:
    """A film: where it is, or the name under which it was sent before."""

    url: str | None  # as of an image; data:video/jpeg;base64,F1,F2,... is its frames
    uuid: str | None = None


@dataclass(frozen=True)
class VideoOptions:
    """Which frames of films a request wants; where both are given, those that are fewer."""

    num_frames: int | None = None  # 1 or more; -1: all that there are
    fps: float | None = None  # above 0; -1: all that there are
