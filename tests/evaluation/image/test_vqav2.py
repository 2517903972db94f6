"""VQAv2: three scores of the same golden predictions, in both layouts; the upload; splits."""

import json
import math

import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation import benchmark
from llava_mini_jax.evaluation.image import vqav2
from tests.evaluation.image import golden_sets as golden

OFFICIAL = {"official": "on_raw_predictions", "llava": "on_llava_processed_predictions"}
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


@pytest.mark.parametrize("layout", golden.LAYOUTS)
@pytest.mark.parametrize("name", ["vqav2", "vqav2_val"])
def test_golden_figures(layout, name, tmp_path):
    expected = golden.expected("vqav2")
    place = golden.folder("vqav2", layout, tmp_path)
    found = benchmark.find(name)
    questions = found.questions(place)
    _, _, given = golden.joined("vqav2", place)
    scores = found.score(place, questions, given.answers)
    assert scores.headline == "llava" and len(questions) == expected["n"]
    for rule, predictions in OFFICIAL.items():
        figures = expected["gt_vision_lab_vqa_python27"][predictions]
        ours = scores.rules[rule]
        assert ours.value == pytest.approx(figures["overall"], **golden.CLOSE)
        for table in ("perAnswerType", "perQuestionType"):
            assert ours.details[table] == pytest.approx(figures[table], **golden.CLOSE)
        items = {key: 100 * item for key, item in ours.items.items()}
        assert items == pytest.approx(figures["per_item"], **golden.CLOSE)
    figures = expected["lmms_eval"]["on_raw_predictions"]
    ours = scores.rules["lmms_eval"]
    assert ours.value == pytest.approx(figures["overall"], **golden.CLOSE)
    items = {key: 100 * item for key, item in ours.items.items()}
    assert items == pytest.approx(figures["per_item"], **golden.CLOSE)


def test_both_layouts_ask_the_same(tmp_path):
    llava, parquet = (
        {
            q.key: (q.question_id, q.text, q.prompt, q.gold)
            for q in vqav2.BENCHMARK.questions(golden.folder("vqav2", layout, tmp_path / layout))
        }
        for layout in golden.LAYOUTS
    )
    assert llava == parquet and len(llava) == golden.expected("vqav2")["n"]


def test_the_official_questions_do_where_llavas_are_not(tmp_path):
    place = golden.folder("vqav2", "llava", tmp_path)
    before = vqav2.BENCHMARK.questions(place)
    asked = place / "llava_vqav2_mscoco_val2014.jsonl"
    pictures = [place / "val2014" / row["image"] for row in golden.read_lines(asked)]
    asked.unlink()
    assert vqav2.BENCHMARK.questions(place) == before
    assert [question.image for question in before] == pictures


def test_unanimous_humans_are_compared_byte_by_byte():
    humans = ["Yes"] * 10
    assert vqav2.official("yes", humans) == 0 and vqav2.always_normalised("yes", humans) == 1
    assert vqav2.official(" Yes\n", humans) == 1
    assert vqav2.official("YES.", ["yes"] * 9 + ["no"]) == 1  # not unanimous: normalised
    assert vqav2.official("Yes", ["Yes ", "Yes\n"] * 5) == 1  # unanimous once stripped


def test_upload_covers_all_of_test2015(tmp_path):
    place = golden.folder("vqav2", "llava", tmp_path)
    found, questions, given = golden.joined("vqav2", place)
    first, *_, last = given.answers

    def upload():
        (path,) = found.submission(place, questions, given.answers, tmp_path / "out")
        return json.loads(path.read_text())

    recorded = json.loads((golden.GOLDEN / "vqav2" / "expected_upload.json").read_text())
    assert upload() == recorded
    test = place / "llava_vqav2_mscoco_test2015.jsonl"
    rows = golden.read_lines(test)
    test.write_text("\n".join(map(json.dumps, [*rows, {**rows[0], "question_id": 1}])))
    assert upload() == [*recorded, {"question_id": 1, "answer": ""}]
    golden.rewrite_lines(test, lambda row: None if str(row["question_id"]) == last else row)
    with pytest.raises(InputError, match=f"does not list {last}"):
        upload()
    answer = given.answers.pop(first)
    message = f"1 of {len(questions)} questions have no answer: {first}"
    with pytest.raises(InputError, match=message):
        upload()
    test.unlink()
    given.answers[first] = answer
    with pytest.raises(InputError, match=r"test2015.jsonl; get it from LLaVA's eval.zip"):
        upload()


def test_test_dev_is_preferred_and_its_score_hidden(tmp_path):
    place = golden.folder("vqav2", "llava", tmp_path)
    val = place / "llava_vqav2_mscoco_val2014.jsonl"
    lines = val.read_text().splitlines()[:5]
    (place / "llava_vqav2_mscoco_test-dev2015.jsonl").write_text("\n".join(lines))
    questions, scores = golden.scored("vqav2", place)
    assert [q.gold for q in questions] == [None] * 5
    assert questions[0].image.parent == place / "test2015"
    recorded = json.loads((golden.GOLDEN / "vqav2" / "expected_upload.json").read_text())
    processed = {str(row["question_id"]): row["answer"] for row in recorded}
    assert scores.parsed == {q.key: processed[q.key] for q in questions}
    assert math.isnan(scores.rules["llava"].value)
    assert len(benchmark.find("vqav2_val").questions(place)) == golden.expected("vqav2")["n"]


def test_a_missing_answer_is_wrong_though_humans_say_nothing(tmp_path):
    """An answer "" to this question is right; no answer is not one."""
    place = golden.folder("vqav2", "llava", tmp_path)
    whole = json.loads((place / ANNOTATIONS).read_text())
    for human in whole["annotations"][0]["answers"]:
        human["answer"] = ""
    (place / ANNOTATIONS).write_text(json.dumps(whole))
    number = whole["annotations"][0]["question_id"]
    lines = [x for x in golden.answer_lines("vqav2") if x["question_id"] != number]
    _, scores = golden.scored("vqav2", place, [*lines, {"question_id": number, "text": ""}])
    assert scores.rules["official"].items[str(number)] == 1
    questions, scores = golden.scored("vqav2", place, lines)
    for rule in scores.rules.values():
        assert rule.items[str(number)] == 0 and rule.details["missing"] == 1
        assert rule.items.keys() == {q.key for q in questions}
        mean = sum(rule.items.values()) / len(questions)
        assert rule.value == pytest.approx(100 * mean, abs=0.006)


def test_broken_data_is_refused(tmp_path):
    place = golden.folder("vqav2", "llava", tmp_path)
    path = place / ANNOTATIONS
    whole = json.loads(path.read_text())

    def refused(annotations, message):
        path.write_text(json.dumps({**whole, "annotations": annotations}))
        with pytest.raises(InputError, match=message):
            vqav2.BENCHMARK.questions(place)

    rows = whole["annotations"]
    first = rows[0]["question_id"]
    refused(rows[1:], f"1 questions are in only one of .*: {first}")
    refused([*rows, {**rows[0], "question_id": 9}], "1 questions are in only one of .*: 9")
    refused([{**rows[0], "answers": ["yes"]}, *rows[1:]], f"question {first}: a str; expected")
    refused([{**rows[0], "answer_type": None}, *rows[1:]], 'annotation 1: "answer_type" is None')
    path.unlink()
    with pytest.raises(InputError, match=f"no .*{ANNOTATIONS}; get it from visualqa.org"):
        vqav2.BENCHMARK.questions(place)
    with pytest.raises(InputError, match=r"no .*test-dev2015.jsonl; get it from LLaVA's eval.zip"):
        vqav2.BENCHMARK.questions(tmp_path)


def test_answers_to_other_questions_are_refused(tmp_path):
    lines = golden.answer_lines("vqav2")
    lines[0] = {**lines[0], "prompt": "What else?"}
    with pytest.raises(
        InputError, match=f"1 of {len(lines)} answers were given to other questions"
    ):
        golden.scored("vqav2", golden.folder("vqav2", "llava", tmp_path), lines)
