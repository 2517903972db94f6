"""POPE: every golden figure in both layouts; labels join by image and question, or not at all."""

import json

import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.image import pope
from tests.evaluation.image import golden_sets as golden

SPLIT_FIGURES = ("TP", "FP", "TN", "FN", "accuracy", "precision", "recall", "f1_score", "yes_ratio")


@pytest.mark.parametrize("layout", golden.LAYOUTS)
def test_golden_figures(layout, tmp_path):
    expected = golden.expected("pope")
    questions, scores = golden.scored("pope", golden.folder("pope", layout, tmp_path))
    assert scores.headline == "official" and len(questions) == len(expected["per_item"])
    official, lmms = scores.rules["official"], scores.rules["lmms_eval"]
    assert official.value == pytest.approx(100 * expected["mean_f1_over_splits"], **golden.CLOSE)
    for split, figures in expected["llava_eval_pope"].items():
        for name in SPLIT_FIGURES:
            assert official.details[split][name] == pytest.approx(figures[name], **golden.CLOSE)
        assert official.details["parts"][split] == pytest.approx(100 * figures["f1_score"])
    for key, item in expected["per_item"].items():
        assert scores.parsed[key] == item["parsed"]
        assert official.items[key] == float(item["parsed"] == item["label"])
    for split, figures in expected["lmms_eval"].items():
        ours = lmms.details[split]
        assert ours["f1_score"] == pytest.approx(figures["f1"], **golden.CLOSE)
        for name in ("accuracy", "precision", "recall", "yes_ratio_of_labels"):
            assert ours[name] == pytest.approx(figures[name], **golden.CLOSE)


def test_both_layouts_ask_the_same(tmp_path):
    llava, parquet = (
        {
            q.key: (q.question_id, q.text, q.prompt, q.gold)
            for q in pope.BENCHMARK.questions(golden.folder("pope", layout, tmp_path / layout))
        }
        for layout in golden.LAYOUTS
    )
    assert llava == parquet and llava.keys() == golden.expected("pope")["per_item"].keys()


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("No", "no"),
        ("not sure", "no"),
        ("I would say no, there is none", "no"),
        ("No. Yes.", "no"),
        ("Yes. No.", "yes"),  # only what stands before the first period
        ("NO", "yes"),
        ("Nope", "yes"),
        ("\nNo", "yes"),
        ("No!", "yes"),
        ("", "yes"),
    ],
)
def test_official_reading(text, read):
    assert pope.read_official(text) == read


def test_order_of_the_label_file_does_not_matter(tmp_path):
    place = golden.folder("pope", "llava", tmp_path)
    path = place / "coco" / "coco_pope_popular.json"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    _, scores = golden.scored("pope", place)
    mean = golden.expected("pope")["mean_f1_over_splits"]
    assert scores.rules["official"].value == pytest.approx(100 * mean, **golden.CLOSE)


def test_label_files_of_another_version_are_refused(tmp_path):
    place = golden.folder("pope", "llava", tmp_path)
    path = place / "coco" / "coco_pope_random.json"
    asked, rows = pope.BENCHMARK.questions(place), golden.read_lines(path)
    first, n = rows[0], len(rows)

    def refused(rows, message):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(InputError, match=message):
            pope.BENCHMARK.questions(place)

    other = {**first, "image": "COCO_val2014_000000000000.jpg"}
    refused([*rows, other], f"{n + 1} labels, llava_pope_test.jsonl has {n} random questions")
    thing = first["text"].partition(" in the ")[0]
    (lost,) = [
        q.key
        for q in asked
        if q.gold["split"] == "random" and q.image.name == first["image"] and thing in q.prompt
    ]  # as many labels, one of another image
    refused([other, *rows[1:]], f"1 of {len(asked)} questions have no label.*: {lost}")
    refused([{**first, "label": "Yes"}, *rows[1:]], r"the label is 'Yes'")
    path.unlink()
    with pytest.raises(InputError, match=r"coco_pope_random.json; get it from .*e3e3926"):
        pope.BENCHMARK.questions(place)


def test_a_missing_answer_is_wrong_and_counted(tmp_path):
    place, expected = golden.folder("pope", "llava", tmp_path), golden.expected("pope")
    items = expected["per_item"]
    gone = next(key for key, x in items.items() if x["parsed"] == x["label"] == "yes")
    lines = [line for line in golden.answer_lines("pope") if str(line["question_id"]) != gone]
    questions, scores = golden.scored("pope", place, lines)
    rule = scores.rules["official"]
    assert rule.details["missing"] == 1 and len(rule.items) == len(items) and rule.items[gone] == 0
    (split,) = [q.gold["split"] for q in questions if q.key == gone]
    ours, before = rule.details[split], expected["llava_eval_pope"][split]
    assert (ours["TP"], ours["FN"]) == (before["TP"] - 1, before["FN"] + 1)


def test_nothing_said_yes_gives_zero(tmp_path):
    lines = [{**line, "text": "no"} for line in golden.answer_lines("pope")]
    _, scores = golden.scored("pope", golden.folder("pope", "llava", tmp_path), lines)
    assert scores.rules["official"].value == 0
    assert scores.rules["official"].details["random"]["precision"] == 0


def test_answers_to_other_questions_are_refused(tmp_path):
    lines = golden.answer_lines("pope")
    lines[0] = {**lines[0], "prompt": "What else?"}
    message = f"1 of {len(lines)} answers were given to other.*: {lines[0]['question_id']}"
    with pytest.raises(InputError, match=message):
        golden.scored("pope", golden.folder("pope", "llava", tmp_path), lines)


def test_broken_parquet_is_refused(tmp_path):
    place = golden.folder("pope", "parquet", tmp_path)
    path = place / "snapshot" / "Full" / "random-00000-of-00001.parquet"
    golden.rewrite_parquet(
        path,
        lambda table: table.rename_columns(
            ["id", "question_id", "text", "answer", "image_source", "image", "category"]
        ),
    )
    with pytest.raises(InputError, match=r"no column question"):
        pope.BENCHMARK.questions(place)
