"""MM-Vet: golden figures of one and of three runs, grade files, requests; asking again."""

import csv
import json
import math

import numpy as np
import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.image import mmvet
from llava_mini_jax.evaluation.judge.judging import Replies, Reply
from tests.evaluation import judged
from tests.evaluation.image import golden_sets as golden

NAME = "mmvet"
BENCHMARK = mmvet.BENCHMARK


def asked(tmp_path, layout="llava", runs=1, lines=None, **options):
    place = golden.folder(NAME, layout, tmp_path)
    _, questions, joined = golden.joined(NAME, place, lines)
    options = {"options": {"runs": runs}, **options}
    plan = BENCHMARK.judge.plan(questions, joined.answers, **options)
    replies, canned = judged.judged(plan, judged.read(f"{NAME}/judge_replies.json"))
    return place, questions, joined.answers, replies, canned


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("layout", golden.LAYOUTS)
def test_golden_figures(layout, runs, tmp_path):
    expected = golden.expected(NAME)["mm_vet_evaluator"]
    place, questions, answers, replies, canned = asked(tmp_path, layout, runs)
    scores = BENCHMARK.score(place, questions, answers, replies=replies)
    rule = scores.rules["official"]
    figures = expected[f"{runs}_run"]
    decimals = figures["decimal_places"]
    more = {"total": rule.details["unrounded"], "std": rule.details["std"]}
    for name, table in (("capability", "capability"), ("combination", "capability_combination")):
        found = {**rule.details[name], **more}
        wanted = dict(figures[f"{table}_scores"])
        assert [round(x, decimals) for x in rule.details["runs"]] == wanted.pop("runs")
        if name == "capability":  # the most frequent first; combinations are as frequent as others
            assert list(found) == list(wanted)
        rounded = {name: float(np.round(value, decimals)) for name, value in found.items()}
        assert rounded == pytest.approx(wanted, **judged.CLOSE)
    assert rule.value == pytest.approx(np.round(figures["capability_scores"]["total"], 1))
    assert sum(map(len, canned.requests.values())) == figures["judge_calls"]
    per_item = expected["per_item_1_run" if runs == 1 else "per_item_3_runs"]
    for key, score in per_item.items():
        assert rule.items[key] == pytest.approx(np.mean(score), **judged.CLOSE)


@pytest.mark.parametrize("runs", [1, 3])
def test_golden_grade_files(runs, tmp_path):
    *_, replies, _ = asked(tmp_path, runs=runs)
    paths = BENCHMARK.judge.write(replies, tmp_path, "golden-model")
    results, grades, capabilities, combinations = paths
    golden_grades = judged.GOLDEN / NAME / "results" / grades.name
    assert grades.read_text() == golden_grades.read_text()
    assert results.name == "golden-model.json"
    assert json.loads(results.read_text()) == judged.read(f"{NAME}/golden-model.json")
    if runs == 1:  # the golden figures of three runs have more decimals
        expected = golden.expected(NAME)["mm_vet_evaluator"]["1_run"]
        for path, table in (
            (capabilities, "capability_scores"),
            (combinations, "capability_combination_scores"),
        ):
            header, row = csv.reader(path.read_text().splitlines())
            wanted = expected[table]
            assert row[0] == "golden-model" and header[0] == "" and header[-1] == "runs"
            assert set(header[1:]) == set(wanted)
            assert list(map(float, row[1:-1])) == [wanted[name] for name in header[1:-1]]
            assert row[-1] == str(wanted["runs"])
    assert [path.name for path in paths[2:]] == [
        f"golden-model_gpt-4-0613-{kind}-score-{runs}runs.csv" for kind in ("cap", "cap-int")
    ]


@judged.needs_wording
def test_golden_requests_with_the_official_wording(tmp_path):
    *_, replies, canned = asked(tmp_path, wording=judged.wording("mmvet.json"))
    judged.check_requests(canned, judged.read(f"{NAME}/expected_judge_requests.json"))
    assert replies.about()["wording"] == "official"


def test_golden_requests_but_for_the_words(tmp_path):
    _, questions, answers, _, canned = asked(tmp_path)
    expected = judged.read(f"{NAME}/expected_judge_requests.json")

    def parts(tag):
        question = next(q for q in questions if tag in q.text)
        truth = question.gold["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        return question.text, truth, answers[question.key].text

    judged.check_layout(canned, expected, parts)
    for tag, requests in canned.requests.items():
        texts = [request.body["messages"][0]["content"] for request in requests]
        assert texts[0].endswith("\n" + " | ".join([*parts(tag), ""]))
        again = mmvet.own_texts.MMVET["again"]
        assert set(texts[1:]) <= {f"{texts[0]}\n{again}"}


def test_several_runs_are_paid_for_each(tmp_path):
    *_, replies, _ = asked(tmp_path, runs=2)
    first, second = (
        {r.digest for ask in replies.plan.asks if f"run {n}" in ask.key for r in ask.requests}
        for n in (1, 2)
    )
    assert len(first) == len(second) and not first & second


def test_the_sixth_reply_is_never_read(tmp_path):
    place, questions, answers, replies, _ = asked(tmp_path)
    first, second = (question.key for question in questions[:2])

    def said(*texts):
        return [Reply(text=text, model="", date=judged.DATE) for text in texts]

    late = {f"{first}, run 1": said(*5 * ["abc"], "1"), f"{second}, run 1": said(*6 * ["It: 0.5"])}
    assert late.keys() <= replies.by_key.keys()
    late = Replies(plan=replies.plan, by_key={**replies.by_key, **late}, pending={})
    scores = BENCHMARK.score(place, questions, answers, replies=late)
    for key, tolerant in ((first, 1), (second, 0.5)):
        assert scores.rules["official"].items[key] == 0 and key in scores.unparsed
        assert scores.rules["tolerant"].items[key] == tolerant


@pytest.mark.parametrize(
    "reply, official, tolerant",
    [
        ("0.7", 0.7, 0.7),
        ("0.3 because", 0.3, 0.3),
        ("1\n", 1.0, 1.0),
        (" 0.6", None, 0.6),
        ("Correctness: 0.5.", None, 0.5),
        ("0.55x", None, None),
        ("1.5", None, None),
        ("-0.5", None, None),
        ("50%", None, None),
        ("0.5 or 0.6", 0.5, None),
        ("", None, None),
    ],
)
def test_readers(reply, official, tolerant):
    assert mmvet.read_official(reply) == official
    assert mmvet.read_tolerant(reply) == tolerant


def test_a_missing_answer_is_worth_nothing_and_asks_nothing(tmp_path):
    whole = asked(tmp_path / "whole")
    first, *lines = golden.answer_lines(NAME)
    place, questions, answers, replies, canned = asked(tmp_path, lines=lines)
    tag = judged.tag(first["prompt"])
    assert tag in whole[-1].requests and tag not in canned.requests
    full, less = (
        BENCHMARK.score(p, q, a, replies=r).rules["official"]
        for p, q, a, r, _ in (whole, (place, questions, answers, replies, None))
    )
    (gone,) = full.items.keys() - answers.keys()
    lost = 100 * full.items[gone] / len(questions)
    assert less.details["unrounded"] == pytest.approx(full.details["unrounded"] - lost)


def test_pending_items_give_no_figure(tmp_path):
    place, questions, answers, replies, _ = asked(tmp_path, runs=3)
    key = questions[3].key
    gone = f"{key}, run 2"
    by_key = {ask: said for ask, said in replies.by_key.items() if ask != gone}
    partly = Replies(plan=replies.plan, by_key=by_key, pending={gone: "no response"})
    scores = BENCHMARK.score(place, questions, answers, replies=partly)
    assert math.isnan(scores.rules["official"].value)
    _, grades = BENCHMARK.judge.write(partly, tmp_path, "m")
    first, *_ = golden.expected(NAME)["mm_vet_evaluator"]["per_item_3_runs"][key]
    assert json.loads(grades.read_text())[key]["score"] == [first]  # the evaluator goes on there


def test_broken_data(tmp_path):
    place = golden.folder(NAME, "llava", tmp_path)
    path = place / "mm-vet.json"
    items = json.loads(path.read_text())
    name = next(iter(items))
    for change, says in (
        ({"capability": []}, f"{name} has no image or no capability"),
        ({"capability": "ocr"}, f'{name}: "capability"'),
        ({"answer": None}, f'{name}: "answer"'),
    ):
        path.write_text(json.dumps({**items, name: {**items[name], **change}}))
        with pytest.raises(InputError, match=says):
            BENCHMARK.questions(place)
    with pytest.raises(InputError, match="runs is 0"):
        asked(tmp_path / "again", runs=0)
