"""MLVU: every golden figure and prompt."""

import json

import pytest

from llava_mini_jax.evaluation.rules.letters import first_of, lmms_letter
from llava_mini_jax.evaluation.video import mlvu
from tests.evaluation.image.golden_sets import CLOSE, expected
from tests.evaluation.video.test_mvbench import folder, lines, right_by_all, scored, unread

TITLES = {task.name: task.title for task in mlvu.TASKS}


def test_golden_figures(tmp_path):
    wanted = expected("mlvu")
    assert wanted["paper_column_names"] == TITLES
    questions, scores = scored("mlvu", folder("mlvu", tmp_path), lines("mlvu"))
    rules = scores.rules
    assert [q.text for q in questions] == [item["prompt"] for item in wanted["per_item"]]
    for question, item in zip(questions, wanted["per_item"], strict=True):
        assert question.key.split("/")[0] == item["task"]
        assert f"({question.gold['letter']}) {question.gold['answer']}" == item["gt"]
        for rule, name in (
            ("release_option", "official_option_rule"),
            ("release_first_letter", "llava_mini_first_letter_acc"),
            ("lmms_eval", "lmms_eval"),
        ):
            assert rules[rule].items[question.key] == item[name], (rule, item)
        assert lmms_letter(item["pred"]) == item["lmms_eval_letter"]
        assert (first_of(item["pred"], "ABCD") or "A") == item["llava_mini_first_letter"]
    option = dict(wanted["official_and_llava_mini_option_rule_percent"])
    first = dict(wanted["llava_mini_first_letter_percent"])
    assert rules["release_option"].value == pytest.approx(option.pop("Avg"), **CLOSE)
    assert rules["release_first_letter"].value == pytest.approx(first.pop("macro_avg"), **CLOSE)
    for rule, figures in (("release_option", option), ("release_first_letter", first)):
        by_title = {TITLES[name]: value for name, value in figures.items()}
        assert rules[rule].details["parts"] == pytest.approx(by_title, **CLOSE)
    macro = wanted["lmms_eval_macro_percent"]
    assert rules["lmms_eval"].value == pytest.approx(macro, **CLOSE)


def test_the_first_letter_takes_none_for_wrong(tmp_path):
    questions, scores = scored("mlvu", folder("mlvu", tmp_path), lines("mlvu"))
    headline = scores.rules["first_letter"]
    assert scores.headline == "letter"
    wanted = expected("mlvu")["per_item"]
    for question, item in zip(questions, wanted, strict=True):
        right = item["llava_mini_first_letter_acc"] and not unread(item)
        assert headline.items[question.key] == right
        assert (not scores.readings["first_letter"][question.key]) == unread(item)
    assert headline.details["unread_videos"] == sum(item["pred"] == "N/A" for item in wanted)


def test_a_missing_answer_is_wrong_and_counted(tmp_path):
    wanted, given = expected("mlvu"), lines("mlvu")
    rules = ("official_option_rule", "llava_mini_first_letter_acc", "lmms_eval")
    n, gone = right_by_all(wanted, *rules)
    given.pop(n)
    questions, scores = scored("mlvu", folder("mlvu", tmp_path), given)
    assert all(rule.items[questions[n].key] == 0 for rule in scores.rules.values())
    assert scores.rules["first_letter"].details["missing"] == 1
    own = [i["official_option_rule"] for i in wanted["per_item"] if i["task"] == gone["task"]]
    percent = scores.rules["release_option"].details["parts"][TITLES[gone["task"]]]
    assert percent == pytest.approx(100 * (sum(own) - 1) / len(own), **CLOSE)


def test_videos_are_in_their_tasks_folders(tmp_path):
    place = folder("mlvu", tmp_path)
    found = {q.key: q.video for q in mlvu.BENCHMARK.questions(place)}
    rows = json.loads((place / "json" / "1_plotQA.json").read_text())
    named = {f"plotQA/{n}": row["video"] for n, row in enumerate(rows)}
    videos = place / "video" / "1_plotQA"
    assert {key: found[key] for key in named} == {key: videos / v for key, v in named.items()}
    assert mlvu.BENCHMARK.max_frames == 1000
