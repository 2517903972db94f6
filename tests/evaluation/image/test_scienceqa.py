"""ScienceQA: every golden figure in both layouts; the question that leaves the denominator."""

import json
import math

import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.image import scienceqa
from tests.evaluation.image import golden_sets as golden

RULES = {"letter", "official", "all_image_questions", "official_all", "lmms_eval", "lmms_eval_all"}


def with_picture():
    """The test questions that have an image, as ScienceQA's own file says."""
    problems = json.loads((golden.GOLDEN / "scienceqa" / "problems.json").read_text())
    return {key for key, one in problems.items() if one["split"] == "test" and one["image"]}


@pytest.mark.parametrize("layout", golden.LAYOUTS)
def test_golden_figures(layout, tmp_path):
    expected = golden.expected("scienceqa")
    place = golden.folder("scienceqa", layout, tmp_path, "pid_splits.json")
    questions, scores = golden.scored("scienceqa", place)
    rules = scores.rules
    assert scores.headline == "letter" and rules.keys() == RULES
    llava, lmms = expected["llava_eval_science_qa"], expected["lmms_eval"]
    shown, n = with_picture(), len(with_picture())

    def percent(items):
        """Of the questions with an image; lmms-eval is given "FAILED" for missing answers."""
        return 100 * sum(items.get(key, 0) for key in shown) / n

    correct = {key: item["correct"] for key, item in llava["per_item"].items()}
    figures = {
        "official": (llava["img_accuracy_percent"], llava["img_count"]),
        "all_image_questions": (percent(correct), n),
        "official_all": (llava["accuracy_percent"], llava["count"]),
        "lmms_eval": (percent(lmms["per_item"]), n),
    }
    for rule, (value, n) in figures.items():
        assert rules[rule].value == pytest.approx(value, **golden.CLOSE)
        assert len(rules[rule].items) == n
    for key, item in llava["per_item"].items():
        assert (scores.readings["official"].get(key) or "FAILED") == item["parsed"]
        assert rules["official_all"].items[key] == item["correct"]
        assert (key in rules["official"].items) == item["counted_as_image_question"]
    answered = {k: v for k, v in rules["lmms_eval_all"].items.items() if k in scores.parsed}
    assert answered == lmms["per_item"]
    assert sum(answered.values()) / len(answered) == pytest.approx(lmms["all_mean"], abs=1e-6)
    pictured = [v for k, v in answered.items() if k in rules["lmms_eval"].items]
    assert sum(pictured) / len(pictured) == pytest.approx(lmms["img_mean"], abs=1e-6)
    golds = {q.key: q.gold["letter"] for q in questions}
    assert golds == {key: item["gt"] for key, item in llava["per_item"].items()}


def test_missing_answers_are_counted_and_a_rule_keeps_them(tmp_path):
    place = golden.folder("scienceqa", "llava", tmp_path)
    questions, scores = golden.scored("scienceqa", place)
    answered = {str(line["question_id"]) for line in golden.answer_lines("scienceqa")}
    missing = {q.key for q in questions} - answered
    assert scores.rules["official"].details["missing"] == len(missing & with_picture())
    assert scores.rules["all_image_questions"].details["missing"] == len(missing & with_picture())
    assert scores.rules["official_all"].details["missing"] == len(missing)
    _, scores = golden.scored("scienceqa", place, [])
    assert scores.rules["official"].items == {} and math.isnan(scores.rules["official"].value)
    assert scores.rules["all_image_questions"].items.keys() == with_picture()


def test_answers_to_other_questions_are_refused(tmp_path):
    place = golden.folder("scienceqa", "llava", tmp_path)
    prompt = "<image>\nWhat is the capital of France?\nA. Nice\nB. Paris"
    lines = [{**line, "prompt": prompt} for line in golden.answer_lines("scienceqa")]
    with pytest.raises(InputError, match=r"scienceqa: .* answers were given to other questions"):
        golden.scored("scienceqa", place, lines)


def test_both_layouts_ask_the_same(tmp_path):
    llava, parquet = (
        {
            q.key: (q.question_id, q.text, q.prompt, q.image is None, q.gold)
            for q in scienceqa.BENCHMARK.questions(
                golden.folder("scienceqa", layout, tmp_path / layout, "pid_splits.json")
            )
        }
        for layout in golden.LAYOUTS
    )
    per_item = golden.expected("scienceqa")["llava_eval_science_qa"]["per_item"]
    assert llava == parquet and llava.keys() == per_item.keys()


def test_parquet_without_ids_and_with_pictures_only(tmp_path):
    place = golden.folder("scienceqa", "parquet", tmp_path)
    whole = scienceqa.BENCHMARK.questions(place)
    assert [q.key for q in whole[:2]] == ["row 0", "row 1"]
    for path in place.rglob("ScienceQA-FULL/*"):
        path.unlink()
    pictured = scienceqa.BENCHMARK.questions(place)
    assert [q.text for q in pictured] == [q.text for q in whole if q.image is not None]
    assert all(q.prompt == f"<image>\n{q.text}" for q in pictured)


@pytest.mark.parametrize(
    ("text", "official", "lmms"),
    [
        ("B", "B", "B"),
        ("e", "FAILED", "E"),
        ("F", "FAILED", "F"),
        ("A.", "FAILED", "A"),
        ("A. red", "A", "A"),
        ("F. red", "FAILED", "F"),
        ("a. red", "FAILED", ""),
        ("C.red", "FAILED", "C"),
        (" B", "FAILED", "B"),
        ("(B)", "FAILED", ""),
        ("The answer is B", "FAILED", ""),  # one more character is asked for
        ("The answer is B.", "B", ""),
        ("So: The answer is Q!", "Q", ""),
        ("The answer is B\n", "FAILED", ""),
        ("The answer is B. The answer is B.", "FAILED", ""),
        ("", "FAILED", ""),
    ],
)
def test_readings(text, official, lmms):
    assert scienceqa.read_official(text) == official
    assert scienceqa.read_lmms(text) == lmms


def test_breakdown_by_subject_context_and_grade(tmp_path):
    place = golden.folder("scienceqa", "llava", tmp_path)
    questions, scores = golden.scored("scienceqa", place)
    every = json.loads((place / "problems.json").read_text())
    problems = {key: problem for key, problem in every.items() if problem["split"] == "test"}
    rule = scores.rules["official_all"]
    social = [k for k, p in problems.items() if p["subject"] == "social science"]
    no_context = [k for k, p in problems.items() if not p["hint"] and not p["image"]]
    for name, keys in (("SOC", social), ("NO", no_context)):
        accuracy = 100 * sum(rule.items[key] for key in keys) / len(keys)
        assert rule.details[name] == pytest.approx({"accuracy": accuracy, "n": len(keys)})
    assert rule.details["G1-6"]["n"] + rule.details["G7-12"]["n"] == len(questions)


def test_broken_data_is_refused(tmp_path):
    place = golden.folder("scienceqa", "llava", tmp_path)
    files = {
        name: (place / name, json.loads((place / name).read_text()))
        for name in ("llava_test_CQM-A.json", "problems.json", "pid_splits.json")
    }

    def refused(name, changed, message):
        path, before = files[name]
        path.write_text(json.dumps(changed))
        with pytest.raises(InputError, match=message):
            scienceqa.BENCHMARK.questions(place)
        path.write_text(json.dumps(before))

    asked, problems = files["llava_test_CQM-A.json"][1], files["problems.json"][1]
    first, second = (row["id"] for row in asked[:2])
    refused("llava_test_CQM-A.json", asked[1:], f"1 questions are in only one of .*: {first}")
    refused("llava_test_CQM-A.json", [*asked, asked[0]], f"1 questions appear twice: {first}")
    refused("llava_test_CQM-A.json", {"a": 1}, "holds a dict; expected a list")
    bare = {"id": first, "conversations": []}
    refused("llava_test_CQM-A.json", [bare, *asked[1:]], f"{first}, first turn: a NoneType")
    refused("pid_splits.json", {"test": []}, f"{len(asked)} questions are in only one")
    without = {name: problem for name, problem in problems.items() if name != second}
    refused("problems.json", without, f"problems.json, {second}: a NoneType; expected an object")
    wrong = {**problems, second: {**problems[second], "choices": ["a", "b"], "answer": 5}}
    refused("problems.json", wrong, f"question {second} has 2 choices and the answer 5")
    files["pid_splits.json"][0].unlink()
    with pytest.raises(InputError, match=r"pid_splits.json; get it from github.com/lupantech"):
        scienceqa.BENCHMARK.questions(place)


def test_ids_of_another_version_are_refused(tmp_path):
    place = golden.folder("scienceqa", "parquet", tmp_path)
    n = len(scienceqa.BENCHMARK.questions(place))
    (place / "pid_splits.json").write_text('{"test": ["1"]}')
    with pytest.raises(InputError, match=f"lists 1 test questions, .* has {n}"):
        scienceqa.BENCHMARK.questions(place)
