"""The headline's reading of multiple choice: the letter that stands alone, or none.

    answer --what it says after thinking--> forms, the surest first:
        the whole        "C"  "(c)."  "**C**"
        a statement      "Answer: C"  "the answer is (B)"  "D is correct"  "答案是C"
        a line           "...\\n\\nC"
        in front         "C. a man walks"  "(C) a man walks"  "C: ..."
        marked           "I think (C)"  "**C**"  "option C"
        the last word    "A man: B"  "so it is B"

The first form that is there decides. It must name one letter: "(A) or (B)" names none, nor does a
list of the options. A letter that is a word is none ("A man walks", "C washes a pot" of EgoSchema's
person C), nor is one that the answer denies ("not B") or one in a word ("Answer").
"""

import re
import unicodedata
from collections.abc import Collection

_THOUGHT = r"(?:think(?:ing)?|thoughts?|reason(?:ing)?|analysis|scratchpad)"
_THOUGHT_ENDS = re.compile(rf"(?:</|\[/|◁/)\s*{_THOUGHT}\s*(?:>|\]|▷)", re.IGNORECASE)
_THOUGHT_BEGINS = re.compile(rf"(?:<|\[|◁)\s*{_THOUGHT}\s*(?:>|\]|▷)", re.IGNORECASE)
_NOISE = re.compile(r"<\|[^|<>]*\|>|</?s>|\\(?:text|textbf|mathrm|mathbf)(?=\{)")
_TAG = re.compile(r"</?[A-Za-z][A-Za-z_]+>")
_ANSWER_TAG = re.compile(r"<\s*answer\s*>|\\boxed(?=\{)", re.IGNORECASE)

_RUN = re.compile(r"([^\w.])\1{2,}")  # long ones say no more, and cost time

_BEFORE = r"(?<![^\W_])(?<![°'’.-])"  # no letter or digit, nor "°C", "x-C"
_BEFORE_CHINESE = r"(?<![A-Za-z0-9°'’.-])"
_AFTER = r"(?![A-Za-z0-9À-ɏ'’+#]|-\w)"
_OPEN, _CLOSE = r"[\s*_#\"'“‘`(\[{<$]*", r"[\s*_\"'”’`)\]}>$.,:;!?。、]*"
_OTHER = re.compile(
    r"[\s*_\"'`)\]}.]*(?:/|&|,|;|\band\b|\bor\b|和|或|、)[\s*_\"'`(\[{]*([A-Z])" + _AFTER
)
# A word in small letters follows: "A man walks" says no letter, "A because .." does.
_READS_ON = re.compile(r"\s+(?!(?:because|since|due|based|given|is|was|and|or)\b)[a-z]")
_LISTED_BEFORE = re.compile(r"([A-Z])[\s*_\"'`)\]}.]*(?:/|&|,|\band\b|\bor\b)[\s*_\"'`(\[{]*$")
# Words in front of a letter, and behind one, that turn its meaning round.
_DENIED = re.compile(
    r"(?:\bnot|n['’]t|\bnever|\bneither|\bnor|\bexcept|\bwithout|\bthan|\bexcludes?|\beliminates?"
    r"|\brules? out|不是|不选|并非)[\s*_\"'`:,]*(?:be\s+)?(?:the\s+)?"
    r"(?:option|choice|answer|letter|选项)?[\s*_\"'`(\[{]*$",
    re.IGNORECASE,
)
_REJECTED = re.compile(
    r"[\s*_\"'`)\]}.]*(?:(?:is|are|was|seems)\s+(?:not|wrong|incorrect|false|unlikely)"
    r"|isn['’]t|can(?:not|['’]t))\b",
    re.IGNORECASE,
)

_NOUN = r"(?:answers?|choice|option|response|selection|prediction|conclusion)"
_VERB = r"(?:is|was|would\s+be|should\s+be|must\s+be|will\s+be|has\s+to\s+be|seems\s+to\s+be)"
_KIND = r"(?:the\s+)?(?:most\s+likely\s+|probably\s+|likely\s+|clearly\s+|therefore\s+|correct\s+)*"
_NAMED = r"(?:(?:option|choice|letter)\b\s*)?"
# "the answer to .. is", "I choose", "答案是", .. and the letter; what stands between has no period.
_STATED = re.compile(
    rf"(?:\b{_NOUN}\b(?:\s+(?:to|for|of|among|from)\s[^.:\n]{{0,120}}?)?[\s*_\"'`]*"
    rf"(?:\b{_VERB}\b|:|=|->|→|⇒)[\s*_:]*"
    r"|\b(?:i|we)(?:['’]d|['’]ll|\s+would|\s+will)?\s+(?:choose|select|pick|go\s+with|say)\b[\s:]*"
    r"|(?:答案|正确选项|正确的选项|选项)\s*(?:应该|应|就)?(?:是|为|:)[\s*]*|(?:选择|应选|选)\s*)"
    rf"{_KIND}{_NAMED}(?P<open>{_OPEN}){_BEFORE_CHINESE}(?P<letter>[A-Za-z]){_AFTER}",
    re.IGNORECASE,
)
_IS_RIGHT = re.compile(
    rf"{_BEFORE}(?P<letter>[A-Z]){_AFTER}[\s*_\"'`)\]}}.]*(?:is|was|seems|would\s+be)\s+(?:the\s+)?"
    r"(?:only\s+|most\s+likely\s+|most\s+)*(?:correct|right|best|true|answer|accurate|appropriate)\b"
)
_LINE = re.compile(rf"^{_OPEN}(?P<letter>[A-Z]){_CLOSE}$", re.MULTILINE)
# Behind a letter in front: "A." but not the initials "A.B.", a dash between blanks, "because".
_FRONT = re.compile(
    r"(?:^|\n)[\s>*_#\-•\"'`]*(?:(?:option|choice|选项)\s+)?"
    r"(?:(?P<both>[(\[{]\s*[A-Za-z]\s*[)\]}])"
    r"|(?P<one>[A-Z][*_]*(?:\.(?![A-Z](?:\.|\b))|[):、]|\s+[-–—]\s|,(?=\s)|(?=\s+because\b)"
    r"|(?=\s+since\b))))",
    re.IGNORECASE,
)
_MARKED = re.compile(
    rf"[(\[{{]\s*(?P<a>[A-Za-z])\s*[)\]}}]|(?:\*\*|__)\(?(?P<b>[A-Z])[.):]?\)?(?:\*\*|__)"
    rf"|[\"“'‘`](?P<c>[A-Z])[\"”'’`]|\*(?P<d>[A-Z])\*|{_BEFORE}(?P<e>[A-Z])\)"
    rf"|(?:\b(?i:option|choice|letter|answer)\s+|选项\s*)(?P<f>[A-Z]){_AFTER}"
    r"|[:,]\s(?P<g>[A-Z])[.:](?=\s|$)"
)
_LAST = re.compile(
    rf"(?:[:,;=→\-—\n]|\b(?:is|be|was|choose|select|pick|say|with|so|therefore|thus|hence|definitely"
    rf"|it['’]s|that['’]s)\b)[\s*_\"'`]*(?P<letter>[A-Z]){_CLOSE}$",
    re.IGNORECASE,
)
_WORDS = "ACI"  # an article, EgoSchema's person, a pronoun


def lone_letter(text: str, letters: Collection[str]) -> str:
    """The one of the `letters` that the answer gives; "" for none, for several and for others."""
    said = _said(text)
    for form in (_whole, _stated, _lines, _in_front, _marked, _last):
        if found := form(said):
            [letter, *others] = found
            return letter if not others and letter in letters else ""
    return ""


def _said(text: str) -> str:
    """The answer without its thoughts and marks of templates; "" while it is still thinking."""
    text = unicodedata.normalize("NFKC", text)
    ends = list(_THOUGHT_ENDS.finditer(text))
    text = text[ends[-1].end() :] if ends else text
    if _THOUGHT_BEGINS.search(text):
        return ""
    text = _ANSWER_TAG.sub(" answer: ", _NOISE.sub("", text))
    return _RUN.sub(r"\1\1", _TAG.sub(" ", text)).strip()


def _whole(text: str) -> set[str]:
    found = re.fullmatch(rf"{_OPEN}([A-Za-z]){_CLOSE}", text)
    return {found[1].upper()} if found else set()


def _stated(text: str) -> set[str]:
    found = set()
    for match in _STATED.finditer(text):
        letter, end = match["letter"], match.end()
        marked = match["open"].strip() != ""
        alone = marked or not _READS_ON.match(text, end)
        if letter.islower():  # "the answer is a dog" has an article, "the answer is a." a letter
            counts = marked or _CLOSING.match(text, end) is not None
        else:
            counts = alone or letter not in _WORDS
        if counts and not _REJECTED.match(text, end):
            found |= {letter.upper()} | _others(text, end)
    for match in _IS_RIGHT.finditer(text):
        if not _DENIED.search(text, 0, match.start("letter")):
            found |= {match["letter"]} | _listed_before(text, match.start("letter"))
    return found


_CLOSING = re.compile(r"[\s*_\"'`]*(?:[.,;:!?)\n]|$)")


def _others(text: str, end: int) -> set[str]:
    """Letters that go on a list: of "A, B or C", B and C behind the first."""
    found = set()
    while other := _OTHER.match(text, end):
        if not _READS_ON.match(text, other.end()):
            found.add(other[1])
        end = other.end()
    return found


def _listed_before(text: str, start: int) -> set[str]:
    before = _LISTED_BEFORE.search(text[:start])
    return {before[1]} if before else set()


def _lines(text: str) -> set[str]:
    return {match["letter"] for match in _LINE.finditer(text)}


def _in_front(text: str) -> set[str]:
    """The letter that begins the answer, with others that begin lines or parts in the same mark."""
    first = _FRONT.match(text)
    if first is None:
        return set()
    both = first["both"] is not None
    letter = _letter(first["both"] or first["one"])
    if letter is None or _REJECTED.match(text, first.end()):
        return set()
    found = {letter}
    if both:
        found |= {m[1] for m in re.finditer(r"[(\[{]\s*([A-Z])\s*[)\]}]\s*\S", text)}
    elif mark := first["one"].strip(" *_\n")[1:2]:
        again = re.escape(mark)  # "A) .. B) ..": a list of the options, and no answer
        found |= {m[1] for m in re.finditer(rf"{_BEFORE}([A-Z]){again}\s+\w", text) if mark != ","}
    rest = text[first.end() :].strip()
    found |= _lines(rest) if not both else set()
    return found | _others(text, first.end())


def _letter(form: str) -> str | None:
    """The letter of a form in front; small ones stand in brackets only."""
    found = re.search("[A-Za-z]", form)
    if found is None or (found[0].islower() and form[0] not in "([{"):
        return None
    return found[0].upper()


def _marked(text: str) -> set[str]:
    found = set()
    for match in _MARKED.finditer(text):
        letter = next(part for part in match.groups() if part)
        if not _DENIED.search(text, 0, match.start()) and not _REJECTED.match(text, match.end()):
            found |= {letter.upper()} | _others(text, match.end())
    return found


def _last(text: str) -> set[str]:
    match = _LAST.search(text)
    if match is None or match["letter"].islower():
        return set()
    start = match.start("letter")
    return (
        set() if _DENIED.search(text, 0, start) else {match["letter"]} | _listed_before(text, start)
    )
