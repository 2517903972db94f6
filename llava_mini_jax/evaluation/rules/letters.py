"""How scorers of multiple choice read an option's letter out of an answer; "" where they find none.

    "The answer is (C)."   first_of           C    the first letter of the options' anywhere
                           before_parenthesis C    one character before the first ")", or everything
                           vlmevalkit         C    a token near the end, "answer is X", or a text
                           lmms_prefetch      C    MMBench's own extractor, as lmms-eval has it
                           lmms_letter        C    lmms-eval's general one
                           lmms_mvbench       C    lmms-eval's for MVBench

Each is exactly what its tool does, with its oddities ("A man: B" is A for most of them). Choices
are a mapping from letters to the options' texts.
"""

import itertools
import re
from collections.abc import Iterable, Mapping

from llava_mini_jax.evaluation.rules import normalise

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_NO_REPLY = "Failed to obtain answer via API"
_TO_BLANKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)


def first_of(text: str, letters: Iterable[str]) -> str:
    """The first character that is one of the letters; the case counts."""
    wanted = set(letters)
    return next((character for character in text if character in wanted), "")


def before_parenthesis(text: str) -> str:
    """The character before the first ")"; all of the text where there is none."""
    end = text.find(")")
    return text if end < 0 else text[max(end - 1, 0) : end]


def vlmevalkit(text: str, choices: Mapping[str, str]) -> str:
    """VLMEvalKit's rules without a judge; "Z" for a refusal.

    A letter as a token counts if it is the only one and stands, at first, among the last four.
    """
    return _vlmevalkit_option(text, choices) or _one_text(text, choices, longest=2)


def _vlmevalkit_option(text: str, choices: Mapping[str, str]) -> str:
    if _NO_REPLY in text:
        return ""
    if any(refusal in text for refusal in _REFUSALS):
        return "Z"
    tokens = text.translate(_TO_BLANKS).split()
    present = [letter for letter in choices if letter in tokens]
    if len(present) == 1 and tokens.index(present[0]) > len(tokens) - 5:
        return present[0]
    if not present and "Z" in tokens:
        return "Z"
    said = _ANSWER_IS.search(text)
    return said[1].upper() if said and said[1].upper() in choices else ""


def _one_text(text: str, choices: Mapping[str, str], longest: float = float("inf")) -> str:
    """The option whose text, and no other's, is in the answer; the case does not count.

    "" for an answer of more than `longest` times the length of all options.
    """
    text = text.lower()
    if len(text) > longest * sum(map(len, choices.values())):
        return ""
    found = [letter for letter, option in choices.items() if option.lower() in text]
    return found[0] if len(found) == 1 else ""


_MARKS_AROUND = "{}. {}, {}: {}) {}). ({}) ({}). :{} :{}, :{}. :{}) :{})."
_WRAPPED = _MARKS_AROUND.split()


def lmms_prefetch(text: str, choices: Mapping[str, str]) -> str:
    """A letter alone or in one kind of punctuation, tried in order; else an option's text.

    Any of A to E, whatever the choices. A letter alone is not taken from more than three words of
    which one is "A".
    """
    if _NO_REPLY not in text:
        words = text.split()
        maybe_article = "A" in words and len(words) > 3
        for form in _WRAPPED if maybe_article else ("{}", *_WRAPPED):
            present = [letter for letter in "ABCDE" if form.format(letter) in words]
            if len(present) == 1:
                return present[0]
    return _one_text(text, choices)


_THE = ("", "the ")
_OTHER_PHRASES = (
    "i choose, i select, i pick, my answer is, my choice is"
    ", 옵션, 정답은, 답은, 답:, 答案是, 答案为, 选, 答えは"
)
_PHRASES = (
    *(f"{the}{noun} is" for the, noun in itertools.product(_THE, ("answer", "choice"))),
    *(
        f"{the}{kind} {noun} is"
        for the, kind, noun in itertools.product(_THE, ("correct", "best"), ("answer", "option"))
    ),
    *(f"{the}correct choice is" for the in _THE),
    *_OTHER_PHRASES.split(", "),
)
_FORMS = {"({})": 6, "{}.": 5, "{}:": 4, "{})": 3, "{} ": 2}  # with their ranks


def lmms_letter(text: str, letters: str = "ABCD") -> str:
    """The letter in the form of the highest rank, of equals the last one.

    From the highest: in front of all, at the end, behind a phrase as "the answer is" (anywhere
    behind it), in the `_FORMS`, and anywhere if there is nothing better.
    """
    bare = text.strip()
    if not bare:
        return ""
    for mark in ",.!?;:'\"":
        bare = bare.strip(mark)
    inner, bare = bare.strip(), f" {bare} "
    found: list[tuple[int, int, str]] = []  # rank, place, letter
    for form, rank in _FORMS.items():
        found += [(rank, bare.rfind(form.format(x)), x) for x in letters if form.format(x) in bare]
    for phrase in _PHRASES:
        start = bare.lower().find(phrase)
        if start >= 0:
            places = ((bare.find(x, start + len(phrase)), x) for x in letters)
            found += [(7, place, x) for place, x in places if place >= 0]
    for x in letters:
        if inner.startswith(x) and not inner[1:2].isalpha():
            found.append((10, 0, x))
        if inner.endswith(x) and not inner[-2:-1].isalpha():
            found.append((9, len(bare) - 1, x))
    found = found or [(0, bare.rfind(x), x) for x in letters if x in bare]
    return max(found, key=lambda f: f[:2])[2] if found else ""


_DOTTED = re.compile(r"([A-E])\.\s*.+$", re.IGNORECASE)
_ALONE = re.compile(r"\b([a-e])\b")


def lmms_mvbench(text: str) -> str:
    """ "X. ..." or the first lone letter, in any case, of what VQA's handling of marks leaves.

    Where there is none: that text, in lower case.
    """
    bare = text.strip()
    if dotted := _DOTTED.match(bare):
        return dotted[1].upper()
    left = normalise.without_marks(normalise.flat(bare), digit=r"\d")  # Python 3's, of any script
    # One mark after the other, as there: quotes inside parentheses stay.
    left = left.strip("'").strip('"').strip(")").strip("(").strip().lower()
    alone = _ALONE.search(left)
    return alone[1].upper() if alone else left
