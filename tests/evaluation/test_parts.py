"""A part of a benchmark's questions (--limit, --offset): what needs whole groups says so."""

import json
import math

import pytest

import eval as eval_program
from llava_mini_jax.evaluation import benchmark
from llava_mini_jax.evaluation.benchmark import Output
from llava_mini_jax.evaluation.image import mme
from llava_mini_jax.evaluation.run import answers
from tests.evaluation.image import golden_sets as golden
from tests.evaluation.video import test_video_chatgpt as chatgpt


def rightly(questions, gold):
    """The right answer to each question."""
    return {
        q.key: Output(text=gold(q.gold), prompt=q.prompt, cut=False, line={}) for q in questions
    }


def test_circular_counts_questions_with_all_their_passes():
    found = benchmark.find("mmbench")
    questions = found.questions(golden.GOLDEN / "mmbench")
    passes = {}
    for question in questions:
        passes.setdefault(str(int(question.key) % 1_000_000), set()).add(question.key)
    right = rightly(questions, lambda gold: gold["letter"])
    golden_rules = found.score(golden.GOLDEN, questions, right).rules
    assert not any("remark" in rule.details for rule in golden_rules.values())
    third = len(questions) // 3
    first_passes = [q for q in questions if int(q.key) < 1_000_000]
    for part in (questions[: 2 * third], questions[third:], first_passes):
        asked = {q.key for q in part}
        whole = {key for key, own in passes.items() if own <= asked}
        rules = found.score(golden.GOLDEN, part, right).rules
        for name in ("circular", "lmms_eval"):
            rule = rules[name]
            assert rule.items == {key: golden_rules[name].items[key] for key in whole}
            assert math.isnan(rule.value) == (not whole)
            lost = len({str(int(key) % 1_000_000) for key in asked} - whole)
            assert rule.details["remark"].startswith(f"{lost} questions are left out: this part")
        assert rules["vanilla"].items.keys() == asked & passes.keys()
    assert not whole  # of the first passes alone


def test_mmes_sum_needs_pairs_and_all_subtasks():
    found = benchmark.find("mme")
    questions = found.questions(golden.GOLDEN / "mme")
    questions.sort(key=lambda q: q.gold["subtask"] in mme.COGNITION)
    right = rightly(questions, lambda gold: gold["answer"])

    def rule(part):
        return found.score(golden.GOLDEN, part, right).rules["official"]

    assert (rule(questions).value, "remark" in rule(questions).details) == (2000, False)
    for count in (1, 2, 3):
        one = rule(questions[:count])
        assert math.isnan(one.value) and len(one.items) == count // 2 * 2
        assert set(one.details["parts"].values()) <= {200}
        assert f"this part of the questions has {min(count, 2) // 2} of 10" in one.details["remark"]
    wrong = Output(text="no idea", prompt="", cut=False, line={})
    alone = {**right, questions[0].key: wrong}
    scores = found.score(golden.GOLDEN, questions[1:], alone)  # its pair is cut: out of the score
    assert scores.rules["official"].value == 2000
    assert len(scores.rules["official"].items) == len(rule(questions).items) - 2


def test_half_an_item_of_consistency_is_no_item(tmp_path):
    place, questions, given, replies, _ = chatgpt.asked(tmp_path)
    at = next(n for n, q in enumerate(questions) if q.key.endswith("/Q2"))
    rules = chatgpt.BENCHMARK.score(place, questions[:at], given, replies=replies).rules
    assert not any(name.startswith("consistency/") for name in rules["all questions"].items)
    assert "consistency" not in rules["all questions"].details["parts"]


@pytest.mark.parametrize(
    ("name", "counts"),
    [("gqa", lambda q: q.gold["isBalanced"]), ("scienceqa", lambda q: q.image is not None)],
)
def test_nothing_that_counts_is_no_score(name, counts):
    found = benchmark.find(name)
    lines = golden.answer_lines(name)
    part = [q for q in found.questions(golden.GOLDEN / name) if not counts(q)]
    assert part
    given = answers.join(found, part, lines)
    scores = found.score(golden.GOLDEN, part, given.answers)
    assert math.isnan(scores.rules[scores.headline].value)


def test_what_eval_says_of_a_part(tmp_path, capsys):
    data, (lines,) = golden.GOLDEN, (golden.GOLDEN / "mmbench" / "answers").rglob("*.jsonl")
    argv = ["--benchmarks", "mmbench", "--data", data, "--out", tmp_path, "--answers", lines]
    assert eval_program.main([*map(str, argv), "--limit", "1"]) == 0
    assert "1 questions are left out: this part of the rows lacks some" in capsys.readouterr().out
    (found,) = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert found["value"] is None and found["rules"]["vanilla"]["value"] in (0, 100)
