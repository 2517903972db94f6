"""Answers files: which line belongs to which question, what counts of two, what is reported."""

import json

import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.benchmark import Benchmark, Question
from llava_mini_jax.evaluation.run import answers


def tool(**more):
    """A benchmark of which only the joining of answers is used."""
    return Benchmark(
        name="world",
        title="World",
        folder="world",
        files={},
        metric="accuracy, %",
        paper={},
        max_new_tokens=8,
        questions=lambda folder: [],
        score=lambda *given: None,
        **more,
    )


def asked(*keys, **more):
    return [
        Question(key=key, question_id=number, text=f"{key}?", prompt=f"{key}?", **more)
        for number, key in enumerate(keys, 1)
    ]


def texts(joined):
    return {key: answer.text for key, answer in joined.answers.items()}


def said(number, text, **more):
    return {"question_id": number, "text": text, **more}


def test_the_first_answer_counts():
    lines = [said(1, "cat"), said(2, "dog"), said(1, "cow"), said(2, "dog"), said(1, "cat")]
    joined = answers.join(tool(), asked("a", "b"), lines)
    assert texts(joined) == {"a": "cat", "b": "dog"}
    assert joined.repeated == ["a"]  # the same once more is no other answer
    assert joined.answers["a"].line is lines[0]
    assert answers.join(tool(), asked("a", "b"), lines[::-1]).answers["a"].text == "cat"
    turned = answers.join(tool(), asked("a"), [lines[2], lines[0]])
    assert texts(turned) == {"a": "cow"} and turned.repeated == ["a"]


def test_answers_come_in_the_questions_order_and_what_does_not_fit_is_told():
    lines = [said(3, "three"), said(9, "nine"), said(1, "one"), {"text": "of no question"}]
    joined = answers.join(tool(), asked("a", "b", "c"), lines)
    assert list(joined.answers) == ["a", "c"] and texts(joined) == {"a": "one", "c": "three"}
    assert (joined.missing, joined.unknown, joined.repeated) == (["b"], ["9", "None"], [])
    nothing = answers.join(tool(), asked("a"), [])
    assert (nothing.answers, nothing.missing) == ({}, ["a"])


def test_ids_may_be_numbers_or_text():
    assert texts(answers.join(tool(), asked("a"), [said("1", "one")])) == {"a": "one"}
    named = [Question(key="a", question_id="7", text="", prompt="")]
    assert texts(answers.join(tool(), named, [said(7, "seven")])) == {"a": "seven"}


def test_our_own_key_goes_before_ids():
    questions = asked("a", "b")
    own = said(1, "of b", metadata={"key": "b"})  # ids need not be unique: MME's are images
    assert texts(answers.join(tool(), questions, [own])) == {"b": "of b"}
    gone = said(1, "of none", metadata={"key": "c"})
    assert answers.join(tool(), questions, [gone]).unknown == ["1"]
    for others in ({}, None, {"more": 1}, "text"):  # LLaVA's own metadata is {}
        line = said(2, "of b", metadata=others)
        assert texts(answers.join(tool(), questions, [line])) == {"b": "of b"}


def test_a_benchmark_may_join_by_more_than_the_id():
    by_prompt = tool(key_of=lambda line: str(line.get("prompt")).removesuffix("?"))
    lines = [said(1, "dog", prompt="b?"), said(1, "cat", prompt="a?"), said(2, "x", prompt="c?")]
    joined = answers.join(by_prompt, asked("a", "b"), lines)
    assert texts(joined) == {"a": "cat", "b": "dog"} and joined.unknown == ["2"]
    own = said(1, "mine", prompt="b?", metadata={"key": "a"})
    assert texts(answers.join(by_prompt, asked("a", "b"), [own])) == {"a": "mine"}


def test_what_an_answer_keeps_of_its_line():
    (question,) = asked("a", record={"round_id": 3})
    line = answers.line_of(question, "cat", answer_id="x", model_id="m", cut=True)
    assert line == {
        "question_id": 1,
        "prompt": "a?",
        "text": "cat",
        "answer_id": "x",
        "model_id": "m",
        "metadata": {"key": "a", "cut": True},
        "round_id": 3,
    }
    kept = answers.join(tool(), [question], [line]).answers["a"]
    assert (kept.text, kept.prompt, kept.cut, kept.line) == ("cat", "a?", True, line)
    others = answers.join(tool(), [question], [said(1, "cat")]).answers["a"]
    assert (others.prompt, others.cut) == ("", None)  # they do not say


def test_two_questions_of_one_key_are_refused():
    with pytest.raises(InputError, match="world: two questions have the key b; correct the data"):
        answers.join(tool(), asked("a", "b", "c", "b"), [])


def test_lines_are_read_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "answers.jsonl"
    rows = [said(1, "cat"), said(2, "dog")]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    assert answers.read_lines(path) == rows
    for broken, reason in (
        ({"question_id": 3}, 'line 2: "text" is nothing'),
        ({"question_id": 3, "text": None}, 'line 2: "text" is None'),
        (["text"], "line 2: a list; expected an object"),
    ):
        path.write_text("\n".join(map(json.dumps, [rows[0], broken])))
        with pytest.raises(InputError, match=reason):
            answers.read_lines(path)
    path.write_text(f"{json.dumps(rows[0])}\n{{")
    with pytest.raises(InputError, match="line 2: not valid JSON"):
        answers.read_lines(path)


def test_rows_in_a_benchmarks_other_form_are_lines_too(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps({"index": 1, "pred": "cat"}))
    other = tool(from_rows=lambda rows: [said(row["index"], row["pred"]) for row in rows])
    assert answers.read_lines(path, other) == [said(1, "cat")]
    for benchmark in (None, tool()):
        with pytest.raises(InputError, match='"text" is nothing'):
            answers.read_lines(path, benchmark)
