"""How the scorers of VQA benchmarks make answers alike, exactly, and count agreeing humans.

    vqa        "The T-shirt."  --marks--> "The T shirt" --words--> "t shirt"    VQA, VizWiz servers
    m4c        "Joe's, 2!"     --lower, no "," and "?", 's apart--> vqa    TextVQA, LLaVA's uploads
    leave_one_out   "cat", ten humans' answers --> 0, 0.3, 0.6, 0.9 or 1

Their oddities are kept where scores hang on them: whether a mark is deleted or becomes a blank is
decided by the whole text; at most 32 periods go; articles go before contractions are restored.
"""

import re
from collections.abc import Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from types import MappingProxyType

_MARKS = ';/[]"{}()=+\\_-><@`,?!'  # in this order, which shows only where one blank makes another
_MOST_PERIODS = 32  # re.UNICODE's value, which the scorers give where the count belongs

_ONE_TO_TEN = "one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0", "zero": "0"} | {
    word: str(n) for n, word in enumerate(_ONE_TO_TEN.split(), 1)
}
_ARTICLES = ("a", "an", "the")
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# Those that the original release of VizWiz's scorer writes with a straight apostrophe.
_STRAIGHT = "ain't aren't can't could've couldn't we've where's who've"
_STRAIGHT_KEYS = ("couldn'tve", "hadn'tve")


def _contractions(apostrophe: str) -> Mapping[str, str]:
    """Each word with one of its apostrophes left out -> the word; so are all the tables."""
    table = {}
    for word in _CONTRACTED.split():
        for place in (i for i, letter in enumerate(word) if letter == "'"):
            key = word[:place] + word[place + 1 :]
            if key not in _STRAIGHT_KEYS:
                key = key.replace("'", apostrophe)
            table[key] = word if word in _STRAIGHT.split() else word.replace("'", apostrophe)
    table[f"somebody{apostrophe}d"] = "somebodyd"  # the wrong way round in all of them
    return MappingProxyType(table)


CONTRACTIONS = _contractions("'")
VIZWIZ_CONTRACTIONS = _contractions("\N{RIGHT SINGLE QUOTATION MARK}")
BACKTICK_CONTRACTIONS = _contractions("`")  # TRI-ML/vlm-evaluation's copy of VizWiz's scorer


def flat(text: str) -> str:
    """Without newlines, tabs, and blanks at its ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def without_marks(text: str, digit: str = "[0-9]") -> str:
    """Marks and periods deleted, or marks made blanks. Digits are ASCII in Python 2's scorers."""
    comma_inside = re.search(f"{digit},{digit}", text) is not None
    without = text
    for mark in _MARKS:
        delete = comma_inside or f"{mark} " in text or f" {mark}" in text
        without = without.replace(mark, "" if delete else " ")
    return re.sub(rf"\.(?!{digit})", "", without, count=_MOST_PERIODS)


def marks_and_words(text: str, contractions: Mapping[str, str] = CONTRACTIONS) -> str:
    """What the scorers do after `flat`: marks, then numbers, articles and contractions."""
    words = [_NUMBERS.get(word, word) for word in without_marks(text).lower().split()]
    return " ".join(contractions.get(word, word) for word in words if word not in _ARTICLES)


def vqa(text: str, contractions: Mapping[str, str] = CONTRACTIONS) -> str:
    """The VQA server's rule (GT-Vision-Lab/VQA), also VizWiz's with its own contractions."""
    return marks_and_words(flat(text), contractions)


def m4c(text: str) -> str:
    """The M4C or "EvalAI" rule: TextVQA's, and LLaVA's for uploads to VQAv2 and VizWiz."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return vqa(text.strip())


def leave_one_out(prediction: str, humans: Sequence[str]) -> float:
    """The mean over the humans of min(matches among the other ones / 3, 1); 0 without humans."""
    scores = []
    for left_out in range(len(humans)):
        others = [answer for i, answer in enumerate(humans) if i != left_out]
        scores.append(min(1.0, others.count(prediction) / 3))
    return sum(scores) / len(scores) if scores else 0.0


def percent(values: Sequence[float]) -> float:
    """100 times the mean with two decimals, halves away from zero: Python 2's round. 0 of none."""
    mean = 100 * float(sum(values)) / len(values) if values else 0.0
    return float(Decimal(mean).quantize(Decimal("0.01"), ROUND_HALF_UP))
