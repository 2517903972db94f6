"""Video-ChatGPT's five dimensions: golden figures, verdicts and requests; what data breaks."""

import json
import shutil

import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.judge import own_texts
from llava_mini_jax.evaluation.judge.judging import Reply
from llava_mini_jax.evaluation.run import answers
from llava_mini_jax.evaluation.video import video_chatgpt
from tests.evaluation import judged

NAME = "video_chatgpt_generative"
BENCHMARK = video_chatgpt.BENCHMARK
SETS = ("generic", "temporal", "consistency")


class Judges:
    """A judge a dimension, as the golden replies have them; told apart by the system message."""

    def __init__(self, systems):
        self.by_system = {
            systems[f"{d}.system"]: judged.Canned(judged.read(f"{NAME}/judge_replies/{d}.json"))
            for d in video_chatgpt.DIMENSIONS
        }
        self.of = dict(zip(video_chatgpt.DIMENSIONS, self.by_system.values(), strict=True))

    def __call__(self, request):
        return self.by_system[request.body["messages"][0]["content"]](request)


def rows_of(place, kind):
    path = place / "predictions" / f"{kind}_qa.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def asked(tmp_path, **options):
    place = tmp_path / NAME
    if not place.exists():
        shutil.copytree(judged.GOLDEN / NAME, place)
    questions = BENCHMARK.questions(place)
    lines = BENCHMARK.from_rows([row for kind in SETS for row in rows_of(place, kind)])
    joined = answers.join(BENCHMARK, questions, lines)
    assert not joined.unknown and not joined.repeated
    plan = BENCHMARK.judge.plan(questions, joined.answers, **options)
    judges = Judges(plan.wording.texts)
    return place, questions, joined.answers, judged.replies_of(plan, judges), judges


def test_golden_figures(tmp_path):
    expected = judged.read(f"{NAME}/expected.json")
    place, questions, given, replies, judges = asked(tmp_path)
    scores = BENCHMARK.score(place, questions, given, replies=replies)
    official = scores.rules["official"]
    assert official.value == pytest.approx(expected["average_of_five"], **judged.CLOSE)
    for dimension, figures in expected["dimensions"].items():
        kind, found = video_chatgpt.DIMENSIONS[dimension], official.details[dimension]
        items = len(json.loads((place / "Benchmarking_QA" / f"{kind}_qa.json").read_text()))
        assert found["average_score"] == pytest.approx(figures["average_score"], **judged.CLOSE)
        assert (found["n"], found["left out"]) == (figures["n"], items - figures["n"])
        calls = sum(map(len, judges.of[dimension].requests.values()))
        assert calls == figures["judge_calls"]
        whole = scores.rules["all questions"].details[dimension]
        assert whole["n"] == items and whole["left out"] == 0
        total = figures["average_score"] * figures["n"]
        assert whole["average_score"] == pytest.approx(total / items)


def test_a_grade_is_cut_but_for_the_tolerant(tmp_path):
    place, questions, given, replies, _ = asked(tmp_path)
    graded = judged.replies_of(
        replies.plan, lambda request: Reply(text="{'score': 3.9}", model="", date=judged.DATE)
    )
    rules = BENCHMARK.score(place, questions, given, replies=graded).rules
    for rule, grade in (("official", 3), ("all questions", 3), ("tolerant", 3.9)):
        answered = {item for item in rules[rule].items if item in replies.by_key}
        assert {rules[rule].items[item] for item in answered} == {grade}


def test_golden_verdicts(tmp_path):
    place, questions, given, replies, _ = asked(tmp_path)
    paths = BENCHMARK.judge.write(replies, tmp_path / "out", "m")
    assert len(paths) == 5
    for dimension, path in zip(video_chatgpt.DIMENSIONS, paths, strict=True):
        assert path.name == f"{dimension}_results.json"
        expected = judged.read(f"{NAME}/expected/{dimension}_combined.json")
        assert json.loads(path.read_text()) == expected
        scores = {key: int(verdict["score"]) for key, (verdict, _) in expected.items()}
        rule = BENCHMARK.score(place, questions, given, replies=replies).rules["official"]
        ours = [v for key, v in rule.items.items() if key.startswith(f"{dimension}/")]
        assert ours == [scores[key] for key in sorted(scores, key=list(json_keys(path)).index)]


def json_keys(path):
    return json.loads(path.read_text())


@judged.needs_wording
def test_golden_requests_with_the_official_wording(tmp_path):
    *_, replies, judges = asked(tmp_path, wording=judged.wording("video_chatgpt.json"))
    for dimension, canned in judges.of.items():
        path = f"{NAME}/expected/{dimension}_judge_requests.json"
        judged.check_requests(canned, judged.read(path))
    assert replies.about()["wording"] == "official"


@pytest.mark.parametrize("dimension", video_chatgpt.DIMENSIONS)
def test_golden_requests_but_for_the_words(dimension, tmp_path):
    place, _, _, _, judges = asked(tmp_path)
    expected = judged.read(f"{NAME}/expected/{dimension}_judge_requests.json")
    rows = rows_of(place, video_chatgpt.DIMENSIONS[dimension])

    def parts(tag):
        if dimension == "consistency":  # Q1 twice
            row = next(row for row in rows if tag in row["Q1"])
            return row["Q1"], row["Q1"], row["A"], row["pred1"], row["pred2"]
        row = next(row for row in rows if tag in row["Q"])
        return row["Q"], row["A"], row["pred"]

    judged.check_layout(judges.of[dimension], expected, parts)
    digest = own_texts.VIDEO_CHATGPT_SHA256[f"{dimension}.system"]
    assert {one["message_sha256"][0] for sent in expected.values() for one in sent} == {digest}


def test_the_second_question_is_an_option(tmp_path):
    place, *_, replies, judges = asked(tmp_path, options={"second_question": True})
    first = rows_of(place, "consistency")[0]
    (request, *_) = judges.of["consistency"].requests[judged.tag(first["Q1"])]
    assert first["Q2"] != first["Q1"] and first["Q2"] in request.body["messages"][1]["content"]
    *_, path = BENCHMARK.judge.write(replies, tmp_path / "out", "m")
    _, shown = json.loads(path.read_text())[f"{first['video_name']}_0"]
    assert shown["q2"] == first["Q2"]


def test_predictions_as_the_release_writes_them(tmp_path):
    place, questions, given, *_ = asked(tmp_path)
    with pytest.raises(InputError, match="have no answer"):
        BENCHMARK.submission(place, questions, given, tmp_path)
    answered = [question for question in questions if question.key in given]
    paths = BENCHMARK.submission(place, answered, given, tmp_path / "out")
    for kind, path in zip(SETS, paths, strict=True):
        assert path.read_text() == (place / "predictions" / f"{kind}_qa.jsonl").read_text()


def test_half_an_answer_of_consistency_is_none(tmp_path):
    _, questions, given, *_ = asked(tmp_path)
    key = next(key for key in given if key.endswith("/Q2"))
    less = {k: answer for k, answer in given.items() if k != key}
    whole, part = (
        {ask.key for ask in BENCHMARK.judge.plan(questions, some).asks} for some in (given, less)
    )
    assert whole - part == {f"consistency/{key.removesuffix('/Q2')}"} and part < whole


def test_the_same_question_twice_about_a_video(tmp_path):
    place = tmp_path / NAME
    shutil.copytree(judged.GOLDEN / NAME, place)
    path = place / "Benchmarking_QA" / "generic_qa.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([rows[0], {**rows[0], "A": "another"}, *rows[1:]]))
    questions = BENCHMARK.questions(place)
    given = BENCHMARK.from_rows([{**rows[0], "pred": "one"}, {**rows[0], "pred": "two"}])
    joined = answers.join(BENCHMARK, questions, given)
    texts = {key: answer.text for key, answer in joined.answers.items()}
    name = f"generic/{rows[0]['video_name']}"
    assert texts == {f"{name}_0": "one", f"{name}_1": "two"}


@pytest.mark.parametrize(
    "kind, change, says",
    [
        ("generic", lambda rows: [{**rows[0], "A": None}, *rows[1:]], 'item 1: "A" is None'),
        ("consistency", lambda rows: [{"Q1": "?"}], '"Q2" is nothing'),
        ("temporal", lambda rows: {}, "expected a list"),
    ],
)
def test_broken_data(kind, change, says, tmp_path):
    place, *_ = asked(tmp_path)
    path = place / "Benchmarking_QA" / f"{kind}_qa.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(InputError, match=says):
        BENCHMARK.questions(place)
    path.unlink()
    with pytest.raises(InputError, match="there is no"):
        BENCHMARK.questions(place)
