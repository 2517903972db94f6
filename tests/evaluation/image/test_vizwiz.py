"""VizWiz: all golden scores in both layouts; the upload; what the server does not normalise."""

import json
import math

import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation import benchmark
from llava_mini_jax.evaluation.image import vizwiz
from tests.evaluation.image import golden_sets as golden

SERVERS = {
    "official": ("vizwiz_official", "on_raw_predictions"),
    "llava": ("vizwiz_official", "on_llava_upload"),
    "vlm_evaluation": ("vlm_evaluation_copy", "on_raw_predictions"),
    "vlm_evaluation_llava": ("vlm_evaluation_copy", "on_llava_upload"),
}


@pytest.mark.parametrize("layout", golden.LAYOUTS)
def test_golden_figures(layout, tmp_path):
    expected = golden.expected("vizwiz")
    questions, scores = golden.scored("vizwiz", golden.folder("vizwiz", layout, tmp_path))
    assert scores.headline == "llava" and len(questions) == expected["n"]
    assert scores.rules.keys() == {*SERVERS, "lmms_eval"}
    for rule, (scorer, predictions) in SERVERS.items():
        figures, ours = expected[scorer][predictions], scores.rules[rule]
        assert ours.value == pytest.approx(figures["overall"], **golden.CLOSE)
        for name in ("answerable", "unanswerable", "unanswerability"):
            assert ours.details[name] == pytest.approx(figures[name], **golden.CLOSE)
        items = {key: 100 * item for key, item in ours.items.items()}
        assert items == pytest.approx(figures["per_item"], **golden.CLOSE)
    figures, ours = expected["lmms_eval"]["on_raw_predictions"], scores.rules["lmms_eval"]
    assert ours.value == pytest.approx(figures["overall"], **golden.CLOSE)
    items = {key: 100 * item for key, item in ours.items.items()}
    assert items == pytest.approx(figures["per_item"], **golden.CLOSE)


def test_both_layouts_ask_the_same(tmp_path):
    llava, parquet = (
        {
            q.key: (q.question_id, q.text, q.prompt, q.gold["answers"])
            for q in vizwiz.BENCHMARK.questions(golden.folder("vizwiz", layout, tmp_path / layout))
        }
        for layout in golden.LAYOUTS
    )
    assert llava == parquet and len(llava) == golden.expected("vizwiz")["n"]


def test_the_annotations_do_where_llavas_questions_are_not(tmp_path):
    place = golden.folder("vizwiz", "llava", tmp_path)
    before = vizwiz.BENCHMARK.questions(place)
    asked = place / "llava_val.jsonl"
    pictures = [place / "val" / row["image"] for row in golden.read_lines(asked)]
    asked.unlink()
    assert vizwiz.BENCHMARK.questions(place) == before
    assert [question.image for question in before] == pictures


def test_upload(tmp_path):
    place = golden.folder("vizwiz", "llava", tmp_path)
    found, questions, given = golden.joined("vizwiz", place)
    (path,) = found.submission(place, questions, given.answers, tmp_path / "out")
    upload = json.loads(path.read_text())
    assert upload == json.loads((golden.GOLDEN / "vizwiz" / "expected_upload.json").read_text())
    last = questions[-1].key
    del given.answers[last]
    with pytest.raises(InputError, match=f"1 of {len(questions)} .* no answer: {last}"):
        found.submission(place, questions, given.answers, tmp_path / "out")


def only(text, humans, tmp_path):
    """The rules' scores of one question with this answer."""
    answers = [{"answer": human, "answer_confidence": "yes"} for human in humans]
    row = {"image": "a.jpg", "question": "what is it?", "answers": answers, "answerable": 1}
    (tmp_path / "val.json").write_text(json.dumps([row]))
    _, scores = golden.scored("vizwiz", tmp_path, [{"question_id": 0, "text": text}])
    return {name: rule.value for name, rule in scores.rules.items()}


def test_human_answers_are_compared_as_stored(tmp_path):
    scores = only("Yes.", ["Yes"] * 10, tmp_path)
    assert scores["official"] == scores["llava"] == 0 and scores["lmms_eval"] == 100
    assert only("YES", ["yes"] * 10, tmp_path)["official"] == 100  # no rule for agreeing humans


def test_restored_contractions_are_typographic(tmp_path):
    scores = only("dont know", ["don't know"] * 10, tmp_path)
    assert scores["official"] == 0 and scores["lmms_eval"] == 100
    assert scores["llava"] == 100  # the upload's processing restores it straight, before
    assert only("dont know", ["don’t know"] * 10, tmp_path)["official"] == 100
    assert only("dont know", ["don`t know"] * 10, tmp_path)["vlm_evaluation"] == 100
    assert only("cant", ["can't"] * 10, tmp_path)["official"] == 100


def test_a_question_of_the_annotations_is_asked_as_llava_does(tmp_path):
    only("x", ["x"] * 10, tmp_path)
    (asked,) = vizwiz.BENCHMARK.questions(tmp_path)
    assert asked.text == (
        "What is it?\nWhen the provided information is insufficient, respond with 'Unanswerable'."
        "\nAnswer the question using a single word or phrase."
    )


def test_test_split_is_preferred_and_its_score_hidden(tmp_path):
    place = golden.folder("vizwiz", "llava", tmp_path)
    (place / "llava_val.jsonl").rename(place / "llava_test.jsonl")
    questions, scores = golden.scored("vizwiz", place)
    assert math.isnan(scores.rules["llava"].value) and len(scores.parsed) == len(questions)
    assert questions[0].image.parent == place / "test"
    assert benchmark.find("vizwiz_val").questions(place)[0].gold is not None


def test_a_missing_answer_is_wrong_and_counted(tmp_path):
    place, expected = golden.folder("vizwiz", "llava", tmp_path), golden.expected("vizwiz")
    items = expected["vizwiz_official"]["on_raw_predictions"]["per_item"]
    gone = next(key for key, item in items.items() if item)
    numbers = {q.key: q.question_id for q in vizwiz.BENCHMARK.questions(place)}
    lines = [x for x in golden.answer_lines("vizwiz") if x["question_id"] != numbers[gone]]
    _, scores = golden.scored("vizwiz", place, lines)
    for rule in scores.rules.values():
        assert rule.items[gone] == 0
        assert len(rule.items) == expected["n"] and rule.details["missing"] == 1


def test_broken_data_is_refused(tmp_path):
    place = golden.folder("vizwiz", "llava", tmp_path)
    path = place / "val.json"
    rows = json.loads(path.read_text())
    first = rows[0]["image"]

    def refused(changed, message):
        path.write_text(json.dumps(changed))
        with pytest.raises(InputError, match=message):
            vizwiz.BENCHMARK.questions(place)

    refused(rows[1:], f"1 images are in only one of .*: {first}")
    refused([*rows, {**rows[0], "image": "z.jpg"}], r"1 images are in only one of .*: z.jpg")
    refused([*rows, rows[0]], f"has {first} twice")
    refused([{**rows[0], "answers": [{"text": "a"}]}], f'{first}: "answer" is')
    refused([{"image": "a.jpg"}], 'item 1: "question" is nothing')
    refused({"data": rows}, "holds a dict; expected a list")
    path.unlink()
    with pytest.raises(InputError, match=r"val.json; get it from Annotations.zip"):
        vizwiz.BENCHMARK.questions(place)
