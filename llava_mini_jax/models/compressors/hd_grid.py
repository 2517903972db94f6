"""TokenPacker-HD's rule: into how many square blocks an image of any shape is cut.

    (height, width), at most `limit` blocks --best of a fixed list--> rows x columns of blocks
                                           --aspect kept--> size that the image is resized to;
                                                            zeros fill the rest, right and bottom

Host arithmetic, with Python's rounding, as in the authors' code.
"""

from typing import NamedTuple

# In the authors' order, of which the first maximum wins; (4, 6) and (6, 4) stand in it twice.
_9 = "1x1 1x2 2x1 1x3 3x1 2x2 1x4 4x1 1x5 5x1 1x6 6x1 2x3 3x2 1x7 7x1 4x2 2x4 1x8 8x1 3x3 1x9 9x1"
_16 = f"{_9} 2x5 5x2 2x6 6x2 3x4 4x3 2x7 7x2 3x5 5x3 2x8 8x2 4x4"
_25 = (
    f"{_16} 3x6 6x3 2x9 9x2 4x5 5x4 2x10 10x2 3x7 7x3 11x2 2x11 4x6 6x4 12x2 2x12 3x8 8x3 4x6 6x4"
    " 5x5"
)
GRIDS = {
    limit: tuple(tuple(map(int, grid.split("x"))) for grid in text.split())
    for limit, text in {9: _9, 16: _16, 25: _25}.items()
}


class HdGrid(NamedTuple):
    blocks: tuple[int, int]  # rows, columns
    size: tuple[int, int]  # height and width that the image is resized to


def hd_grid(height: int, width: int, *, limit: int, block: int) -> HdGrid:
    """The grid of at most `limit` blocks of `block` pixels for an image."""
    if limit not in GRIDS:
        raise ValueError(f"TokenPacker-HD has no limit of {limit} blocks; use 9, 16 or 25")
    if height < 1 or width < 1:
        raise ValueError(f"an image of {height} x {width} pixels has no blocks")
    rows, columns = max(GRIDS[limit], key=lambda grid: _score(height, width, grid, block))
    by_height, by_width = rows * block / height, columns * block / width
    if by_height <= by_width:
        size = rows * block, min(columns * block, round(width * by_height))
    else:
        size = min(rows * block, round(height * by_width)), columns * block
    return HdGrid((rows, columns), size)


def _score(height: int, width: int, grid: tuple[int, ...], block: int) -> float:
    """How much of the blocks the image fills; and how well their box overlaps with its own."""
    rows, columns = grid
    ratio = min(rows * block / height, columns * block / width)
    area = rows * columns * block * block
    filled = round(height * ratio) * round(width * ratio) / area
    # An image 1.4 times as large: grids that enlarge it a little do not lose.
    tall, wide = height * 1.4, width * 1.4
    both = min(rows * block, tall) * min(columns * block, wide)
    return filled + 0.1 * both / (area + tall * wide - both)
