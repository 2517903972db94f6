"""LLaVA-Bench: golden figures, reviews and requests in both layouts; what judges and data break."""

import json
import math

import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.image import llava_bench
from llava_mini_jax.evaluation.judge import own_texts
from tests.evaluation import judged
from tests.evaluation.image import golden_sets as golden

NAME = "llava_bench"
BENCHMARK = llava_bench.BENCHMARK


def asked(tmp_path, layout="llava", lines=None, **options):
    place = golden.folder(NAME, layout, tmp_path)
    _, questions, joined = golden.joined(NAME, place, lines)
    plan = BENCHMARK.judge.plan(questions, joined.answers, **options)
    replies, canned = judged.judged(plan, judged.read(f"{NAME}/judge_replies.json"))
    return place, questions, joined.answers, replies, canned


@pytest.mark.parametrize("layout", golden.LAYOUTS)
def test_golden_figures(layout, tmp_path):
    expected = golden.expected(NAME)
    place, questions, answers, replies, _ = asked(tmp_path, layout)
    scores = BENCHMARK.score(place, questions, answers, replies=replies)
    official = scores.rules["official"]
    for part, figures in expected["llava_summary"].items():
        assert official.details[part] == pytest.approx(figures, **judged.CLOSE)
    assert official.value == expected["llava_summary"]["all"]["relative_score"]
    assert scores.parsed == expected["parsed_per_item"]
    assert scores.unparsed == [str(key) for key in expected["unparsed_items"]]
    without = scores.rules["without unread"]
    informative = expected["informative_relative_score_without_unparsed"]
    assert without.details["unrounded"] == pytest.approx(informative, **judged.CLOSE)
    assert without.details["counted"] == len(questions) - len(scores.unparsed)
    assert official.details["counted"] == len(questions)


@pytest.mark.parametrize("layout", golden.LAYOUTS)
def test_golden_requests_with_the_official_wording(layout, tmp_path):
    rule = judged.GOLDEN / NAME / "rule.json"
    *_, replies, canned = asked(tmp_path, layout, wording=rule)
    judged.check_requests(canned, judged.read(f"{NAME}/expected_judge_requests.json"))
    assert replies.about()["wording"] == "official"


def test_whose_wording(tmp_path):
    *_, replies, canned = asked(tmp_path)
    assert replies.about()["wording"] == "ours"
    system, user = next(iter(canned.requests.values()))[0].body["messages"]
    assert system["content"] == own_texts.LLAVA_BENCH_SYSTEM
    assert user["content"].endswith(f"[System]\n{own_texts.LLAVA_BENCH['llava_bench_conv']}\n\n")
    rule = judged.read(f"{NAME}/rule.json")
    rule["llava_bench_conv"]["prompt"] += " "
    (tmp_path / "rule.json").write_text(json.dumps(rule))
    *_, replies, _ = asked(tmp_path / "again", wording=tmp_path / "rule.json")
    assert replies.about()["wording"] == "unknown wording"


def test_golden_reviews(tmp_path):
    *_, replies, _ = asked(tmp_path)
    (path,) = BENCHMARK.judge.write(replies, tmp_path, "golden-model")
    expected = judged.GOLDEN / NAME / "reviews" / "golden-model.jsonl"
    assert path.name == expected.name
    lines, wanted = (p.read_text(encoding="utf-8").splitlines() for p in (path, expected))
    assert list(map(json.loads, lines)) == list(map(json.loads, wanted))
    assert lines == wanted


def test_a_missing_answer_is_judged_as_an_empty_one(tmp_path):
    lines = golden.answer_lines(NAME)[1:]
    place, questions, answers, replies, canned = asked(tmp_path, lines=lines)
    gone = judged.tag(golden.answer_lines(NAME)[0]["prompt"])
    user = canned.requests[gone][0].body["messages"][-1]["content"]
    assert "[Assistant 2]\n\n\n[End of Assistant 2]" in user
    rule = BENCHMARK.score(place, questions, answers, replies=replies).rules["official"]
    assert rule.details["counted"] == len(questions)


@pytest.mark.parametrize(
    "reply, official, tolerant",
    [
        ("8 7\nwhy", (8, 7), (8, 7)),
        ("8,7", (8, 7), (8, 7)),
        ("8, 7", None, (8, 7)),
        ("8/10 7/10", None, (8, 7)),
        ("Assistant 1: 8 Assistant 2: 7.5", None, (8, 7.5)),
        ("8\n\n7", None, (8, 7)),
        ("\n8 7", None, (8, 7)),
        ("1e1 5", (10, 5), None),
        ("0 11", (0, 11), None),
        ("8\nBoth have 3 faults", None, None),
        ("8 7 6", None, None),
        ("12.3.4 5", None, None),
        ("", None, None),
    ],
)
def test_readers(reply, official, tolerant):
    assert llava_bench.read_official(reply) == official
    assert llava_bench.read_tolerant(reply) == tolerant


def test_means_are_rounded_before_they_are_divided():
    found = llava_bench.summary([(1, 1), (1, 2), (2, 2)])  # 5 / 4, of 1.667 / 1.333
    assert found == {"relative_score": 125.1, "gpt4_x10": 13.3, "model_x10": 16.7}


def test_pending_items_give_no_figure(tmp_path):
    place, questions, answers, replies, _ = asked(tmp_path)
    first = questions[0].key
    by_key = {key: said for key, said in replies.by_key.items() if key != first}
    partly = type(replies)(plan=replies.plan, by_key=by_key, pending={first: "status 500"})
    scores = BENCHMARK.score(place, questions, answers, replies=partly)
    assert all(math.isnan(rule.value) for rule in scores.rules.values())
    judge = scores.rules["official"].details["judge"]
    assert judge["pending"] == 1 and judge["first of the pending"] == {first: "status 500"}
    (path,) = BENCHMARK.judge.write(partly, tmp_path, "m")
    assert path.read_text() == ""  # the script would skip the wrong questions


def test_scored_without_replies(tmp_path):
    with pytest.raises(InputError, match="graded by another model"):
        golden.scored(NAME, golden.folder(NAME, "llava", tmp_path))


@pytest.mark.parametrize(
    "file, change, says",
    [
        ("answers_gpt4.jsonl", lambda rows: rows.pop(0), "{question_id}"),
        ("context.jsonl", lambda rows: rows.pop(0), "{image} of {question_id}"),
        ("context.jsonl", lambda rows: rows[0].update(caption=7), "caption 7"),
        ("questions.jsonl", lambda rows: rows.append(rows[0]), '"question_id" {question_id}'),
        ("questions.jsonl", lambda rows: rows[0].update(category="other"), "other"),
    ],
)
def test_broken_data(file, change, says, tmp_path):
    place = golden.folder(NAME, "llava", tmp_path)
    rows = golden.read_lines(place / file)
    same = rows[0].keys() & {"question_id", "image"}
    first = next(
        row
        for row in golden.read_lines(place / "questions.jsonl")
        if all(row[name] == rows[0][name] for name in same)
    )
    change(rows)
    (place / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=says.format(**first)):
        BENCHMARK.questions(place)


def test_answers_to_other_questions(tmp_path):
    lines = [{**line, "prompt": "What else?"} for line in golden.answer_lines(NAME)]
    with pytest.raises(InputError, match="other questions"):
        asked(tmp_path, lines=lines)
