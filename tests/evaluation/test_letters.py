"""Readers of letters: what the tools that they follow read from these answers."""

import pytest

from llava_mini_jax.evaluation.rules import letters

CHOICES = {"A": "cat", "B": "a red car", "D": "7"}


@pytest.mark.parametrize(
    ("text", "first", "before"),
    [
        ("The answer is (C).", "C", "C"),
        ("Best option:(C)", "B", "C"),
        ("b)", "", "b"),
        (") A", "A", ""),
        ("A B)", "A", "B"),
        (" D", "D", " D"),
        ("E", "", "E"),
        ("", "", ""),
    ],
)
def test_the_releases_two(text, first, before):
    assert letters.first_of(text, "ABCD") == first
    assert letters.before_parenthesis(text) == before


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B. it is", "B"),
        ("B it is so here", ""),  # not among the last four
        ("B or not B it is so here", ""),  # the first place counts
        ("so it is not here but B", "B"),
        ("A or B", ""),
        ("C", ""),  # no option
        ("Z", "Z"),
        ("Z or A", "A"),
        ("Cannot determine the answer: B", "Z"),
        ("Failed to obtain answer via API: D", ""),
        ("A B, yes: The  Answer is **b** and so on", "B"),
        ("the answer is c", ""),
        ("the answer is dog", "D"),  # the pattern looks at one letter
        ("it is, I think, the cat", "A"),
        ("CAT", "A"),
        ("a cat of 7 lives", ""),
        ("it is, as far as I see, the cat", ""),  # longer than twice all options
    ],
)
def test_vlmevalkit(text, letter):
    assert letters.vlmevalkit(text, CHOICES) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        ("A it is", "A"),
        ("A it is so", ""),  # an article perhaps
        ("so it is B", "B"),
        ("so it is C", "C"),  # is not asked whether it is an option
        ("(A) not (B) but C.", "C"),
        ("it is (D) here", "D"),
        ("it is (D). Yes", "D"),
        ("it is A: yes, :B,", "A"),
        ("it is :B, then", "B"),
        ("[B] is 7", "D"),  # by its text, however long
        ("Failed to obtain answer via API, cat", "A"),
        ("Failed to obtain answer via API: B", ""),
        ("", ""),
    ],
)
def test_lmms_prefetch(text, letter):
    assert letters.lmms_prefetch(text, CHOICES) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("", ""),
        (" ... ", ""),
        ("b", ""),
        ("'C'.", "C"),
        ("'A', so", "A"),
        ("A man: B", "A"),  # in front, above all
        ("(A) man: B", "B"),  # at the end, above parentheses
        ("x (B) y C!", "C"),
        ("The answer is C", "C"),
        ("The answer is (C), not B, I say", "B"),  # any letter behind the phrase, the last one
        ("I choose D because of (A)", "A"),
        ("正确答案是B吗", "B"),
        ("so (A) B. x", "A"),
        ("Dog (A) or (B) here", "B"),
        ("So C. Then D: yes", "C"),
        ("x D: y B) z", "D"),
        ("x B) y D z", "B"),
        ("Apple", "A"),  # in a word, for want of better
        ("xA yB", "B"),
    ],
)
def test_lmms_letter(text, letter):
    assert letters.lmms_letter(text, "ABCD") == letter


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("a.b", "A"),
        ("a.b\nc", "C"),  # not behind another line
        ("b. A thing", "B"),
        ("e.", "E"),
        ("xx. A thing", "A"),
        ("(c", "C"),
        ("x-d", "D"),
        ("x- d", "D"),
        ("x-a -y", "xa y"),  # a mark beside a blank is deleted wherever it stands
        ("x/a 1,2", "xa 12"),  # as all are where a comma is inside a number
        ("It's", "it's"),
        ("1.5 or so.", "1.5 or so"),
        ("x." * 33, "x" * 33 + "."),  # 32 periods go
        ("٣,٤ x.٤", "٣٤ x.٤"),  # digits are those of any script
        ("F", "f"),
        ("", ""),
    ],
)
def test_lmms_mvbench(text, read):
    assert letters.lmms_mvbench(text) == read
