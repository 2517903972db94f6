"""results.json and its table: standard errors of means alone, no NaN in any file."""

import json
import math
import statistics
from collections import Counter
from types import SimpleNamespace

import pytest

from llava_mini_jax.evaluation import benchmark
from llava_mini_jax.evaluation.benchmark import Question, Rule, Scores
from llava_mini_jax.evaluation.run import report
from llava_mini_jax.evaluation.run.answers import Joined
from tests.evaluation.image import golden_sets as golden
from tests.evaluation.image import test_llava_bench as llava_bench
from tests.evaluation.image import test_mmvet as mmvet
from tests.evaluation.video import test_mvbench as videos
from tests.evaluation.video import test_video_chatgpt as video_chatgpt
from tests.evaluation.video import test_video_qa as video_qa

ITEMS = {"a": 1.0, "b": 0.0, "c": 1.0}
NAN = math.nan


def result(**rule):
    """What is reported of a benchmark that scores three questions by this rule."""
    one = {"value": 100 * 2 / 3, "items": ITEMS, "scale": 100, "details": {}, **rule}
    scores = Scores(headline="exact", rules={"exact": Rule(**one)}, parsed={}, unparsed=[])
    questions = [Question(key=key, question_id=key, text="?", prompt="?") for key in ITEMS]
    joined = Joined(answers={}, missing=[], unknown=[], repeated=[])
    named = SimpleNamespace(name="world", title="World", metric="%", paper={})
    return report.result(named, questions, joined, scores, {}, model="m")


def test_the_rule_says_whether_it_is_a_mean():
    error = 100 * statistics.stdev(ITEMS.values()) / math.sqrt(3)
    assert result()["standard_error"] == pytest.approx(error)
    assert result(value=2 / 3, scale=1)["standard_error"] == pytest.approx(error / 100)
    assert result(scale=None)["standard_error"] is None  # an F1 that happens to be the mean
    assert result(value=NAN)["standard_error"] is None
    assert result(items={"a": 1.0})["standard_error"] is None


def test_no_file_and_no_cell_has_a_nan(tmp_path):
    details = {"parts": {"ours": NAN, "theirs": 3.0}, "deep": [{"more": (NAN, math.inf)}]}
    found = result(value=NAN, details=details)
    lines = [{"key": "a", "scores": {"exact": NAN}}]
    report.write(tmp_path, found, lines)
    for name in ("results.json", "samples.jsonl"):
        assert "null" in (tmp_path / name).read_text()
        json.loads((tmp_path / name).read_text(), parse_constant=pytest.fail)
    kept = json.loads((tmp_path / "results.json").read_text())["rules"]["exact"]
    assert kept["value"] is None and kept["details"]["deep"] == [{"more": [None, None]}]
    header, rows = report.table([found], "LLaVA-Mini 7B")
    assert "nan" not in report.markdown(header, rows)
    assert [row[header.index("m")] for row in rows] == ["", "", "3.00"]


NO_MEANS = {  # headlines that are none of their items, with the reason
    "pope": "F1",
    "mme": "sums",
    "llava_bench": "a quotient of means",
    "video_chatgpt": "a mean of means of five sets",
}
TASKS = ("mvbench", "mlvu")  # means of means of tasks: of all items, where tasks are of one size


def scores_of(name, tmp_path):
    if name in ("llava_bench", "mmvet"):
        place, questions, given, replies, _ = {"llava_bench": llava_bench, "mmvet": mmvet}[
            name
        ].asked(tmp_path)
    elif name == "video_chatgpt":
        place, questions, given, replies, _ = video_chatgpt.asked(tmp_path)
    elif name == "msvd_qa":
        place, _, questions, given, replies, _ = video_qa.asked(name, tmp_path)
    elif name in TASKS:
        return videos.scored(name, videos.folder(name, tmp_path), videos.lines(name))[1]
    else:
        return golden.scored(name, golden.folder(name, "llava", tmp_path))[1]
    return benchmark.find(name).score(place, questions, given, replies=replies)


IMAGES = ["gqa", "vqav2", "vizwiz", "scienceqa", "textvqa", "mmbench", "seed_bench"]


@pytest.mark.parametrize("name", [*IMAGES, "mmvet", "msvd_qa", *NO_MEANS, *TASKS])
def test_rules_that_are_means_are_these_means(name, tmp_path):
    scores = scores_of(name, tmp_path)
    for one, rule in scores.rules.items():
        if rule.scale is not None:
            mean = rule.scale * statistics.mean(rule.items.values())
            assert rule.value == pytest.approx(mean, abs=0.051), one  # as far as it is rounded
    is_mean = name not in NO_MEANS
    if name in TASKS:
        sizes = Counter(item["task"] for item in golden.expected(name)["per_item"])
        is_mean = len(set(sizes.values())) == 1
    assert (scores.rules[scores.headline].scale is not None) == is_mean
