"""Parts of a high-resolution image put together: the map that is compressed, and the whole.

    [I, J, P, E] --k*k sub-images as one row-major map--> [I, k*k*P, E]
                 '--the whole image, last of the parts--> [I, P, E]

Dimensions: I images, J = k*k + 1 parts of each (1 without high resolution), P patches, E width.
"""

import dataclasses

import jax

from llava_mini_jax.models.seen import Seen
from llava_mini_jax.params import Array


def what_is_compressed(seen: Seen) -> tuple[Seen, Array | None]:
    """Of images of J parts: what is compressed, an image a row, and the whole's patches."""
    I, J, P, E = seen.patches_IPE.shape
    patches, whole_IPE = detail_and_whole(seen.patches_IPE.reshape(I * J, P, E), I, J)
    # What is read beside patches is defined on whole images; the question has no parts.
    rest = dataclasses.replace(seen, patches_IPE=None, question_IT=None)
    rest = jax.tree.map(lambda x: x[:, 0], rest)
    detail = dataclasses.replace(rest, patches_IPE=patches, question_IT=seen.question_IT)
    return detail, whole_IPE


def detail_and_whole(features_RPE: Array, I: int, J: int) -> tuple[Array, Array | None]:
    """What is compressed, [I, k*k*P, E] as one row-major map, and the whole image [I, P, E]."""
    if J == 1:
        return features_RPE, None
    P, E = features_RPE.shape[1:]
    k, side = round((J - 1) ** 0.5), round(P**0.5)
    if k * k + 1 != J:
        raise ValueError(f"{J} parts are not k*k sub-images and a whole image")
    parts = features_RPE.reshape(I, J, P, E)
    # [I, (row, column) of the sub-image, (y, x) of the patch, E] -> rows of the whole map.
    rows = parts[:, :-1].reshape(I, k, k, P, E).reshape(I, k, k, side, side, E)
    rows = rows.transpose(0, 1, 3, 2, 4, 5)
    return rows.reshape(I, k * side * k * side, E), parts[:, -1]
