"""Questions about pages of digits, and digits with which every answer comes as often.

    kind --digits_for, needle--> a page's digits --ask--> "which digit is in row 2 column 1?", "7"
                                                  '--> "Which digit is in row 2, column 1?",
                                                       "It is 7."

`below(n)` everywhere draws the item's next random number, from 0 to n - 1.
"""

from collections.abc import Callable

KINDS = ("position", "row", "column", "count", "largest", "read", "caption", "needle")
NEEDLE_QUESTION = "which digit is on a single page?"

# Asked alone: the answers of two contain all others, and a needle makes its own pages.
ALONE = ("read", "caption", "needle")
_MOST_COUNTED = 4  # no page is made to hold more copies of the digit that is counted

# A kind's questions, each with the answer that it gets: the words of this world's own tokenizer, or
# whole sentences, for language models that know English. One question, one answer: an exact match
# is well defined.
WORDINGS: dict[str, dict[str, tuple[tuple[str, str], ...]]] = {
    "brief": {
        "position": (("which digit is in row {row} column {column}{on_page}?", "{answer}"),),
        "row": (("read row {row}{on_page}.", "{answer}"),),
        "column": (("read column {column}{on_page}.", "{answer}"),),
        "count": (("how many {counted}s are there{on_page}?", "{answer}"),),
        "largest": (("which is the largest digit{on_page}?", "{answer}"),),
        "read": (("read {page}.", "{answer}"),),
        "caption": (("", "{answer}"),),
    },
    "english": {
        "position": (
            ("Which digit is in row {row}, column {column}?", "It is {answer}."),
            ("What is in column {column} of row {row}?", "There is the digit {answer}."),
            ("Look at row {row}, column {column}.", "I see the digit {answer}."),
        ),
        "row": (
            ("What does row {row} say?", "It says {answer}."),
            ("Please read row {row} to me.", "Row {row} reads {answer}."),
            ("Tell me what is in row {row}.", "I can see {answer}."),
        ),
        "column": (
            ("What does column {column} say?", "It says {answer}."),
            ("Please read column {column} to me.", "Column {column} reads {answer}."),
            ("Tell me what is in column {column}.", "I can see {answer}."),
        ),
        "count": (
            ("How often does the digit {counted} appear?", "I count {answer}."),
            ("Count the digits that are {counted}.", "Their number is {answer}."),
        ),
        "largest": (
            ("Which is the largest digit?", "The largest digit is {answer}."),
            ("What is the highest number on the page?", "It is {answer}."),
        ),
        "read": (
            ("What does the page say?", "It says {answer}."),
            ("Please read the page to me.", "The page reads {answer}."),
        ),
    },
}


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
    wording: str = "brief",
    below: Callable[[int], int],
) -> tuple[str, str]:
    """A question and its answer in one of WORDINGS; `page` names the page of a video ("page 3") or
    is empty."""
    rows = [digits[start : start + columns] for start in range(0, len(digits), columns)]
    told = {"page": page or "the page", "on_page": f" on {page}" if page else ""}
    if kind == "position":
        row, column = divmod(below(len(digits)), columns)
        told |= {"row": row + 1, "column": column + 1}
        answer = str(rows[row][column])
    elif kind in ("row", "column"):
        lines = rows if kind == "row" else _turned(rows)
        number = below(len(lines))
        told |= {kind: number + 1}
        answer = _say(lines[number])
    elif kind == "count":
        told |= {"counted": counted}
        answer = str(digits.count(counted))
    elif kind == "largest":
        answer = str(max(digits))
    elif kind == "read":
        answer = _say(digits)
    else:
        answer = _caption(rows, below)
    forms = WORDINGS[wording][kind]
    question, reply = forms[below(len(forms)) if len(forms) > 1 else 0]
    return question.format(**told), reply.format(**told, answer=answer)


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
