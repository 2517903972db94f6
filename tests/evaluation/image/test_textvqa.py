"""TextVQA: every golden figure in both layouts; joined by image and question of the prompt."""

import json
import re

import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.image import textvqa
from tests.evaluation.image import golden_sets as golden

SHORT = "\nAnswer the question using a single word or phrase."


@pytest.mark.parametrize("layout", golden.LAYOUTS)
def test_golden_figures(layout, tmp_path):
    expected = golden.expected("textvqa")
    questions, scores = golden.scored("textvqa", golden.folder("textvqa", layout, tmp_path))
    names = {q.key: str(q.gold["question_id"]) for q in questions}
    assert scores.headline == "official" and len(names) == expected["n"]
    llava = expected["llava_eval_textvqa"]
    for rule, value, items in (
        ("official", llava["accuracy_percent_unrounded"], llava["per_item"]),
        ("lmms_eval", *expected["lmms_eval"].values()),
    ):
        ours = scores.rules[rule]
        assert ours.value == pytest.approx(value, **golden.CLOSE)
        assert {names[k]: v for k, v in ours.items.items()} == pytest.approx(items, **golden.CLOSE)
    processed = {names[key]: text for key, text in scores.parsed.items()}
    assert processed == expected["m4c_processed_prediction"]


def test_both_layouts_have_the_same_questions(tmp_path):
    """The golden parquet files have other OCR words than the question file, so texts differ."""
    llava, parquet = (
        {
            q.key: (q.question_id, q.gold)
            for q in textvqa.BENCHMARK.questions(
                golden.folder("textvqa", layout, tmp_path / layout)
            )
        }
        for layout in golden.LAYOUTS
    )
    assert llava == parquet and len(llava) == golden.expected("textvqa")["n"]


def test_parquet_questions_carry_the_ocr_line(tmp_path):
    place = golden.folder("textvqa", "parquet", tmp_path)

    def change(table):
        rows = table.to_pylist()
        rows[0].update(question="is the stove on?", ocr_tokens=[])
        rows[1].update(question="is it raining?", ocr_tokens=["STOP", "5:30"])
        return table.from_pylist(rows, schema=table.schema)

    golden.rewrite_parquet(next(place.rglob("*.parquet")), change)
    first, second, *_ = textvqa.BENCHMARK.questions(place)
    assert first.text == f"Is the stove on?\nReference OCR token: {SHORT}"
    assert second.text == f"Is it raining?\nReference OCR token: STOP, 5:30{SHORT}"


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        (f"Who?{SHORT}", "Who?"),
        (f"Who?\nReference OCR token: a, b{SHORT}", "Who?"),
        (f"Reference OCR token: a, b\nWho?{SHORT}", "Who?"),
        (f"Reference OCR token: \nWho?{SHORT}", "Who?"),
        ("OCR tokens: a, b. Question: Who? Short answer:", "Who?"),
        ("Who?", None),
        (f"Who?\nOCR: a{SHORT}", None),
    ],
)
def test_question_of_a_prompt(prompt, question):
    assert textvqa.question_of(prompt) == question


def test_an_answer_whose_prompt_holds_no_question_is_unknown(tmp_path):
    lines = golden.answer_lines("textvqa")
    lines[0] = {**lines[0], "prompt": "Who?"}
    place = golden.folder("textvqa", "llava", tmp_path)
    _, questions, given = golden.joined("textvqa", place, lines)
    assert given.unknown == [lines[0]["question_id"]] and len(given.missing) == 1
    _, scores = golden.scored("textvqa", place, lines)
    rule = scores.rules["official"]
    assert rule.items[given.missing[0]] == 0 and len(rule.items) == len(questions)
    assert rule.details["missing"] == 1


def repeat_first(place):
    """Asks the first question again: humans say yes, then no. The line of the answer yes to it."""
    asked = place / "llava_textvqa_val_v051_ocr.jsonl"
    row, lines = golden.read_lines(asked)[0], asked.read_text().splitlines()
    asked.write_text("\n".join([*lines, lines[0]]))
    path = place / "TextVQA_0.5.1_val.json"
    listed = json.loads(path.read_text())
    first = listed["data"][0]
    first["answers"] = ["yes"] * 10
    listed["data"].append({**first, "answers": ["no"] * 10, "question_id": 1})
    path.write_text(json.dumps(listed))
    return {"question_id": row["question_id"], "prompt": row["text"], "text": "yes"}


def test_the_same_question_twice_about_a_picture_stays_two(tmp_path):
    place = golden.folder("textvqa", "llava", tmp_path)
    line, n = repeat_first(place), golden.expected("textvqa")["n"]
    questions, scores = golden.scored("textvqa", place, [line])
    assert len(questions) == n + 1 and questions[-1].key == f"{questions[0].key} (2)"
    items = scores.rules["official"].items
    assert (items[questions[0].key], items[questions[-1].key]) == (1, 0)
    assert scores.rules["official"].details["missing"] == n - 1


def test_broken_data_is_refused(tmp_path):
    place = golden.folder("textvqa", "llava", tmp_path)
    path, asked = place / "TextVQA_0.5.1_val.json", place / "llava_textvqa_val_v051_ocr.jsonl"
    rows, lines = json.loads(path.read_text())["data"], asked.read_text()

    def refused(changed, message):
        path.write_text(json.dumps({"data": changed}))
        with pytest.raises(InputError, match=message):
            textvqa.BENCHMARK.questions(place)
        path.write_text(json.dumps({"data": rows}))

    first = rows[0]
    asks = re.escape(first["question"].lower())
    refused(rows[1:], f"1 questions are in only one of .*: {first['image_id']}: {asks}")
    refused([*rows, {**first, "image_id": "x"}], f"only one of .*: x: {asks}")
    few = {**first, "answers": ["yes"] * 9}
    refused([few, *rows[1:]], f"{first['question_id']} has 9 human answers; expected")
    refused([{"question_id": 1}], 'item 1: "image_id" is nothing')
    asked.write_text(lines.replace("\\n", " ", 1))
    with pytest.raises(InputError, match=r"only one of"):
        textvqa.BENCHMARK.questions(place)
    asked.write_text(lines.replace("\\n", " "))
    with pytest.raises(InputError, match=r"line 1: no question is in"):
        textvqa.BENCHMARK.questions(place)
