"""Where every parameter of the 7B model lies, by mesh: golden files, and what they add up to."""

import pytest

from tests.golden.sharding.make_layouts import HERE, MESHES, text

# Norms, biases and the tower's position table are left whole: together less than 0.2 % of it.
WHOLE_AT_MOST = 2_500_000


def columns(name: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("  ") if cell] for line in text(name).splitlines()]


@pytest.mark.parametrize("name", MESHES)
def test_the_layout_is_the_golden_one(name: str) -> None:
    expected = (HERE / f"{name}.txt").read_text()
    assert text(name) == expected, "if it is meant: python -m tests.golden.sharding.make_layouts"


@pytest.mark.parametrize("name", ["fsdp8", "tensor8", "fsdp4_tensor2"])
def test_nothing_big_is_whole_on_every_device(name: str) -> None:
    for path, _, _, placed, piece in columns(name):
        whole = set(placed.split()) == {"-"}
        if path.startswith("vision/"):
            continue  # frozen, and whole along fsdp: it is read for every few frames
        if whole and int(piece.replace(",", "")) > WHOLE_AT_MOST:
            pytest.fail(f"{path} is whole on every device of {name}: {piece} bytes")


def test_bytes_of_a_device_are_an_eighth_of_the_model_beside_the_tower() -> None:
    total = {name: sum(int(row[-1].replace(",", "")) for row in columns(name)) for name in MESHES}
    # Published counts of Vicuna-7B and the tower; four of Vicuna's layers; projector and query.
    tower, others = 303_507_456, 6_738_415_616 + 4 * 202_383_360 + 20_979_712 + 4096
    assert total["data8"] == 4 * (tower + others)
    # The tower is split along the tensor axis alone.
    for name, of_tower in (("fsdp8", 1), ("tensor8", 8), ("fsdp4_tensor2", 2)):
        least = 4 * (others / 8 + tower / of_tower)
        assert least <= total[name] < 1.004 * least
