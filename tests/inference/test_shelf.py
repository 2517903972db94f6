"""What is kept of the frames: the best that leaves room for all of them."""

import numpy as np
import pytest
from ml_dtypes import bfloat16

from llava_mini_jax.inference.shelf import Budget, Shelf

SIZES = {"memory": 10, "features": 2}


@pytest.mark.parametrize(
    ("budget", "chunks", "expected"),
    [
        (Budget(host=100), 5, "MMMMM"),
        (Budget(host=30), 5, "MMFFF"),  # 10 + 10 + 3 * 2, and no third time 10
        (Budget(host=26), 5, "MMFFF"),
        (Budget(host=25), 5, "MFFFF"),
        (Budget(host=9), 5, "FFFF-"),  # all of one kind rather than a frame to be read again
        (Budget(host=0), 2, "--"),
        (Budget(device=10, host=8), 5, "MFFFF"),
        (Budget(device=3, host=3, disk=2), 4, "FFF-"),
        (Budget(host=100, best="features"), 3, "FFF"),
        (Budget(host=100, best="source"), 2, "--"),
    ],
)
def test_as_much_is_computed_beforehand_as_leaves_room_for_the_rest(budget, chunks, expected):
    shelf, letters = Shelf(budget), {"memory": "M", "features": "F", "source": "-"}
    found = [shelf.choose(SIZES, chunks - 1 - number)[0] for number in range(chunks)]
    assert "".join(letters[tier] for tier in found) == expected
    assert all(shelf.used()[place] <= getattr(budget, place) for place in shelf.used())


def test_arrays_come_back_as_they_were_from_every_place():
    tree = {"a": np.arange(6, dtype=np.int16).reshape(2, 3), "b": np.ones(4, bfloat16) / 3}
    for place in ("device", "host", "disk"):
        shelf = Shelf(Budget(**{"host": 0, place: 1000}))
        kept = shelf.put(1, {"features": tree}, 0)
        assert (kept.tier, kept.place) == ("features", place)
        found = shelf.get(kept)
        assert found.keys() == tree.keys()
        for name, array in tree.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype
