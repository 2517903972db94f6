"""What one request may ask for: a number for each thing that a client could make too large.

flags of `llava-mini serve` --> Limits --> whoever reads bodies, media and fields
"""

import dataclasses
import math
from dataclasses import dataclass

from llava_mini_jax.errors import InputError

MEBIBYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a request. InputError for one of 0 or less: that never means "no limit"."""

    body_bytes: int = 64 * MEBIBYTE  # counted while the body is read
    download_bytes: int = 32 * MEBIBYTE  # of one remote file
    downloads_bytes: int = 64 * MEBIBYTE  # of all remote files of a request
    image_seconds: float = 5.0  # of fetching an image, name, connection and retry included
    video_seconds: float = 30.0  # of fetching a film
    image_pixels: int = 50_000_000  # of one image, or one frame of a film
    decoded_bytes: int = 715_827_880  # of all images and sent frames, 4 a pixel
    images: int = 16
    videos: int = 1
    frames: int | None = None  # of one film; None: what the model's context holds
    choices: int = 16  # `n`
    stops: int = 4
    logprobs: int = 20  # `top_logprobs`
    film_megabytes: int = 2048  # of the process that decodes a film
    film_seconds: float = 60.0  # of its processor time: for the index, and again between frames
    kept_bytes: int = 512 * MEBIBYTE  # of media that clients have named by a `uuid`

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(
                    f"the limit {field.name} is {value}; give a number above 0 (no value means"
                    " no limit)"
                )
