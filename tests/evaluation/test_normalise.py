"""The normalisers of VQA answers against examples of their rules, and under random text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_mini_jax.evaluation.rules import normalise

# Text rich in what the rules look at.
PIECES = st.sampled_from(
    [
        *";/[]\"{}()=+\\_-><@`,?!.:'%$&# \t\n",
        "1",
        "2,3",
        "a",
        "an",
        "the",
        "none",
        "ten",
        "dont",
        "Im",
    ]
)
TEXT = st.lists(PIECES | st.text(max_size=3), max_size=30).map("".join)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("T-shirt", "t shirt"),  # no blank at the mark: it becomes one
        ("blue - green", "blue green"),  # a blank at it: it goes
        ("a-b - c", "ab c"),  # ... everywhere, though the first has no blank
        ("1,000 t-shirts/hats", "1000 tshirtshats"),  # digit, comma, digit: all marks go
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("x/;b/c", "x b c"),  # decided by the original text, not by the blank that ";" became
        ("U.S.A.", "usa"),
        ("3.5.", "3.5"),
        ("v.2", "v.2"),  # a digit follows: stays
        ("x.٣", "x٣"),  # not an ASCII digit
        ("5:30 50% $5 Joe's #1 R&B", "5:30 50% $5 joe's #1 r&b"),
        ("None of the Ten", "0 of 10"),
        ("An apple a day", "apple day"),
        ("dont youd've Im", "don't you'd've im"),
        ("'ows'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),
        ("living\troom\n", "living room"),
        ("the", ""),
        ("", ""),
    ],
)
def test_vqa_rule(text, result):
    assert normalise.vqa(text) == result


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("Joe's", "joe 's"),
        ("1,000-2", "1000 2"),  # commas are gone before digit, comma, digit is looked for
        ("Really?!", "really"),
        ("black, white", "black white"),
        ("hes", "he's"),
    ],
)
def test_m4c_rule(text, result):
    assert normalise.m4c(text) == result


def test_at_most_32_periods_go():
    assert normalise.vqa("." * 32 + "x") == "x"
    assert normalise.vqa("." * 33 + "x") == ".x"
    assert normalise.m4c("a." * 40) == "a" * 33 + ".a" * 7 + "."


def test_tables_of_contractions():
    assert len(normalise.CONTRACTIONS) == len(normalise.VIZWIZ_CONTRACTIONS) == 114
    assert normalise.vqa("dont cant", normalise.VIZWIZ_CONTRACTIONS) == "don’t can't"
    assert normalise.vqa("hadn'tve", normalise.VIZWIZ_CONTRACTIONS) == "hadn’t’ve"
    assert (
        normalise.vqa("youd've", normalise.VIZWIZ_CONTRACTIONS) == "youd've"
    )  # key is typographic
    assert normalise.vqa("dont weve", normalise.BACKTICK_CONTRACTIONS) == "don`t we've"


def test_leave_one_out():
    for matching, score in enumerate([0, 0.3, 0.6, 0.9, 1, 1]):
        humans = ["cat"] * matching + [f"dog {n}" for n in range(10 - matching)]
        assert normalise.leave_one_out("cat", humans) == pytest.approx(score, abs=1e-12)
    assert normalise.leave_one_out("cat", []) == 0


def test_percent_rounds_halves_up():
    assert normalise.percent([0.70625]) == 70.63  # Python 3 alone says 70.62
    assert normalise.percent([1, 0, 0]) == 33.33
    assert normalise.percent([]) == 0


@given(TEXT)
def test_every_text_has_a_normal_form(text):
    for rule in (normalise.vqa, normalise.m4c):
        result = rule(text)
        assert result == result.strip() and "  " not in result
        assert not {"a", "an", "the", "none", "dont"} & set(result.split())


@given(TEXT)
def test_vqa_rule_is_done_after_once_unless_periods_were_left(text):
    once = normalise.vqa(text)
    if text.count(".") <= 32:
        assert normalise.vqa(once) == once


def test_m4c_rule_is_not_done_after_once():
    assert normalise.m4c(normalise.m4c("hes")) == "he 's" != normalise.m4c("hes")
