"""Questions about pages of digits, and digits with which every answer comes as often.

    kind --digits_for, needle--> a page's digits --ask--> "which digit is in row 2 column 1?", "7"

`below(n)` everywhere draws the item's next random number, from 0 to n - 1.
"""

from collections.abc import Callable

KINDS = ("position", "row", "column", "count", "largest", "read", "caption", "needle")
NEEDLE_QUESTION = "which digit is on a single page?"

# Asked alone: the answers of two contain all others, and a needle makes its own pages.
ALONE = ("read", "caption", "needle")
_MOST_COUNTED = 4  # no page is made to hold more copies of the digit that is counted


def digits_for(kind: str, cells: int, below: Callable[[int], int]) -> tuple[list[int], int]:
    """The digits of a page about which `kind` is asked, and the digit to count.

    On pages of independent digits nearly every count is 0 or 1 and nearly every largest digit is 8
    or 9, so that guessing goes far. Here the answers are equally frequent instead.
    """
    counted = below(10)
    if kind == "count":
        digits = [(counted + 1 + below(9)) % 10 for _ in range(cells)]
        free = list(range(cells))
        for _ in range(below(min(cells, _MOST_COUNTED) + 1)):
            digits[free.pop(below(len(free)))] = counted
    elif kind == "largest":
        largest = below(10)
        digits = [below(largest + 1) for _ in range(cells)]
        digits[below(cells)] = largest
    else:
        digits = [below(10) for _ in range(cells)]
    return digits, counted


def needle(
    pages: int, cells: int, odd_page: int, below: Callable[[int], int]
) -> tuple[list[list[int]], tuple[str, str]]:
    """Pages full of one digit, one of them of another; the question for that, and its answer.

    Pages are full, because one digit in an unclear hand would make a page look like the odd one,
    and among a thousand pages there are many such: here the eight beside it tell what it is.
    """
    common = below(10)
    odd = (common + 1 + below(9)) % 10
    digits = [[odd if page == odd_page else common] * cells for page in range(pages)]
    return digits, (NEEDLE_QUESTION, str(odd))


def ask(
    kind: str,
    digits: list[int],
    columns: int,
    *,
    counted: int,
    page: str,
    below: Callable[[int], int],
) -> tuple[str, str]:
    """A question and its answer; `page` names the page of a video ("page 3") or is empty."""
    on_page = f" on {page}" if page else ""
    rows = [digits[start : start + columns] for start in range(0, len(digits), columns)]
    if kind == "position":
        row, column = divmod(below(len(digits)), columns)
        place = f"row {row + 1} column {column + 1}"
        return f"which digit is in {place}{on_page}?", str(rows[row][column])
    if kind in ("row", "column"):
        lines = rows if kind == "row" else _turned(rows)
        number = below(len(lines))
        return f"read {kind} {number + 1}{on_page}.", _say(lines[number])
    if kind == "count":
        return f"how many {counted}s are there{on_page}?", str(digits.count(counted))
    if kind == "largest":
        return f"which is the largest digit{on_page}?", str(max(digits))
    if kind == "read":
        return f"read {page or 'the page'}.", _say(digits)
    return "", _caption(rows, below)


def _caption(rows: list[list[int]], below: Callable[[int], int]) -> str:
    """All rows or all columns in any order: "row 2 is 7 1, row 1 is 4 0".

    Read in one fixed order, a page could be copied token by token, and neither the tower nor the
    language model would have to learn what "row 2" is.
    """
    kind, lines = ("column", _turned(rows)) if below(2) else ("row", rows)
    left = list(range(len(lines)))
    order = [left.pop(below(len(left))) for _ in lines]
    return ", ".join(f"{kind} {number + 1} is {_say(lines[number])}" for number in order)


def _turned(rows: list[list[int]]) -> list[list[int]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _say(digits: list[int]) -> str:
    return " ".join(map(str, digits))
