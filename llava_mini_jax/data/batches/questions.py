"""Questions that a compressor reads, as rows: what each image of a batch is looked at for.

ids of each "<image>" --of_images--> [B, I, T], every frame of a video with the video's
"""

from collections.abc import Sequence

import numpy as np

from llava_mini_jax.errors import InputError
from llava_mini_jax.models.splice import PADDING

Row = tuple[Sequence[np.ndarray], Sequence[int]]  # each mark's question; its images or frames


def padded(ids_T: np.ndarray, length: int) -> np.ndarray:
    """int32 [length], -1 behind the ids."""
    return np.pad(ids_T, (0, length - len(ids_T)), constant_values=PADDING).astype(np.int32)


def of_images(rows: Sequence[Row], images: int, length: int) -> np.ndarray:
    """int32 [B, images, length], -1 where nothing is; rows without an image are empty.

    Raises InputError for a row with other than one question for each image or video.
    """
    out = np.full((len(rows), images, length), PADDING, np.int32)
    for row, (questions, frames) in zip(out, rows, strict=True):
        if not frames:
            continue
        if len(questions) != len(frames):
            raise InputError(
                f"{len(questions)} questions are given for {len(frames)} images or videos, and"
                " the model's compressor reads one for each: write prompts with a tokenizer that"
                " has its reader (data/text/question_ids.py)"
            )
        each = np.stack([padded(ids_T, length) for ids_T in questions])
        row[: sum(frames)] = np.repeat(each, frames, axis=0)
    return out
