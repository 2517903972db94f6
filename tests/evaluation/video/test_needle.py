"""The needle benchmark: what is asked, what of it counts as right, and the curves."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_mini_jax import cli
from llava_mini_jax.data.batches.examples import check_fits
from llava_mini_jax.data.batches.pipeline import Encoder
from llava_mini_jax.data.digits.pages import DigitsConfig, DigitsPages, build_tokenizer
from llava_mini_jax.data.digits.questions import NEEDLE_QUESTION
from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation import benchmark
from llava_mini_jax.evaluation.run.answers import join
from llava_mini_jax.evaluation.video import needle
from llava_mini_jax.inference.request import Pictures, make_request
from llava_mini_jax.training.stages import bundle_of, check, load_config, stages_of
from tests.data.data_files import page_digits

FRAMES = (4, 8, 40)
EACH = 12


@pytest.fixture
def questions(monkeypatch):
    """Few and short ones."""
    monkeypatch.setattr(needle, "FRAMES", FRAMES)
    monkeypatch.setattr(needle, "EACH", EACH)
    return needle.BENCHMARK.questions(None)


def scored(questions, say):
    """Scores of an answerer: `say(question)` is its text, or None where it gives none."""
    rows = [{"question_id": q.key, "prompt": q.prompt, "text": say(q)} for q in questions]
    rows = [row for row in rows if row["text"] is not None]
    answers = join(needle.BENCHMARK, questions, rows).answers
    assert len(answers) == len(rows)
    return needle.BENCHMARK.score(None, questions, answers)


def parts(scores):
    return scores.rules["exact"].details["parts"]


def test_it_needs_no_data_and_is_none_of_the_papers():
    assert "needle" in benchmark.all_names() and not needle.BENCHMARK.files
    assert "needle" not in benchmark.names_of_paper()
    assert needle.FRAMES[-1] == 1000


def test_the_same_questions_each_time_and_the_first_ones_have_all_lengths(questions):
    again = needle.BENCHMARK.questions(None)
    assert [q.key for q in again] == [q.key for q in questions]
    assert len({q.key for q in questions}) == len(FRAMES) * EACH
    for one, other in zip(questions, again, strict=True):
        assert (one.text, one.gold) == (other.text, other.gold)
        np.testing.assert_array_equal(one.video, other.video)
    assert [len(q.video) for q in questions[:6]] == [*FRAMES, *FRAMES]


def test_every_length_has_the_odd_page_at_the_depth_of_the_whole_video(questions):
    config = DigitsConfig(split="heldout", kinds=("needle",), frames=FRAMES[-1], seed=needle.SEED)
    source, depths = DigitsPages(config, EACH), set()
    for question in questions:
        frames, number = map(int, question.key.split("-"))
        whole, digits = source[number]["frames"], page_digits(source, number)[:, 0, 0]
        odd = int(np.flatnonzero(digits == int(question.gold))[0])  # read from the pages' digits
        assert np.count_nonzero(digits == int(question.gold)) == 1
        same = [bool((page == whole[odd]).all()) for page in question.video]
        assert sum(same) == 1
        assert question.video.base is not None  # a view of the whole: pages are held once
        assert abs(same.index(True) / (frames - 1) - odd / (FRAMES[-1] - 1)) < 1 / (frames - 1)
        depths.add(odd)
    assert len(depths) > EACH / 2


def test_a_perfect_answerer_and_one_that_guesses(questions):
    perfect = scored(questions, lambda q: f" {q.gold}\n")
    assert perfect.rules["exact"].value == 100 and not perfect.unparsed
    assert parts(perfect) == {"4 frames": 100, "8 frames": 100, "40 frames": 100}
    always = scored(questions, lambda q: "3")
    share = 100 * np.mean([q.gold == "3" for q in questions])
    assert always.rules["exact"].value == pytest.approx(share) and share < 40
    # Whole answers count: naming every digit finds nothing.
    assert scored(questions, lambda q: "0 1 2 3 4 5 6 7 8 9").rules["exact"].value == 0


def test_each_length_has_its_own_score(questions):
    def say(question):
        frames, number = map(int, question.key.split("-"))
        if frames == 40:
            return None if number < 3 else "no" if number < 6 else question.gold
        return question.gold

    found = scored(questions, say)
    assert parts(found) == {"4 frames": 100, "8 frames": 100, "40 frames": 50}
    assert found.rules["exact"].details["questions"] == {f"{n} frames": EACH for n in FRAMES}
    assert len(found.unparsed) == 3  # without an answer: they count as wrong
    assert found.rules["exact"].items["40-0"] == found.rules["exact"].items["40-4"] == 0
    some = scored(questions[:2], lambda q: q.gold)  # eval.py --limit 2
    assert parts(some) == {"4 frames": 100, "8 frames": 100}


def test_the_curve_is_drawn(questions, tmp_path):
    answers = join(needle.BENCHMARK, questions, []).answers
    (line,) = needle.BENCHMARK.illustrate(questions, answers, tmp_path)
    assert line == f"accuracy by frames: {tmp_path / 'needle.png'}"
    with Image.open(tmp_path / "needle.png") as picture:
        assert picture.width > 600 and len(np.unique(np.asarray(picture))) > 50


def test_points_carry_the_error_of_their_share():
    assert needle.Point(8, 50.0, 100).error == pytest.approx(5.0)
    assert needle.Point(8, 100.0, 100).error == 0


def write_results(out, *models):
    details = {
        "parts": {"8 frames": 75.0, "1000 frames": 50.0},
        "questions": {"8 frames": 4, "1000 frames": 100},
    }
    rules = {"exact": {"value": 60.0, "details": details}}
    found = [
        {"benchmark": "needle", "model": str(model), "headline": "exact", "rules": rules}
        for model in models
    ]
    (out / "results.json").write_text(json.dumps([{"benchmark": "pope"}, *found]))


def test_models_are_compared_with_the_lengths_that_they_were_trained_on(tmp_path, monkeypatch):
    stages = [
        {"name": "short", "data": dataclasses.asdict(DigitsConfig(frames=8, fewest_frames=4))},
        {"name": "long", "data": dataclasses.asdict(DigitsConfig(frames=32))},
        {"name": "files", "data": {"datasets": []}},
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(stages))
    models = [tmp_path / "run" / name / "model" for name in ("short", "long", "files")]
    write_results(tmp_path, *models, "someone/else")
    drawn = []
    monkeypatch.setattr(needle, "draw", lambda curves, path: drawn.extend(curves) or path)
    assert needle.compare(tmp_path) == [tmp_path / "needle.png", tmp_path / "needle.csv"]
    assert [curve.trained for curve in drawn] == [(4, 8), (32, 32), None, None]
    lines = (tmp_path / "needle.csv").read_text().splitlines()
    assert lines[1:4] == [
        "run/short,4,8,8,75.0,21.7,4",
        "run/short,4,8,1000,50.0,5.0,100",
        "run/long,32,32,8,75.0,21.7,4",
    ]
    assert lines[5:] == [
        "run/files,,,8,75.0,21.7,4",
        "run/files,,,1000,50.0,5.0,100",
        "someone/else,,,8,75.0,21.7,4",
        "someone/else,,,1000,50.0,5.0,100",
    ]


def test_a_folder_without_results_is_explained(tmp_path, capsys):
    with pytest.raises(InputError, match="has no results of needle; run "):
        needle.compare(tmp_path)
    (tmp_path / "results.json").write_text("[]")
    assert cli.main(["analyze", "needle", str(tmp_path)]) == 2
    assert "has no results of needle" in capsys.readouterr().err


def test_the_config_trains_on_short_clips_a_model_of_long_videos():
    config = load_config(str(Path(__file__).parents[3] / "configs" / "digits_video.py"))
    (stage,), tokenizer = stages_of(config), build_tokenizer()
    check(stage)
    assert isinstance(stage.data, DigitsConfig) and stage.data.frames == needle.FRAMES[0]
    bundle = bundle_of(stage, tokenizer)
    longest = needle.FRAMES[-1]
    video = Pictures(np.zeros((longest, 1, 30, 30, 3), np.uint8), (longest,))
    asked = make_request(NEEDLE_QUESTION, video, bundle, tokenizer)
    room = bundle.model.llm.max_positions - needle.BENCHMARK.max_new_tokens
    check_fits(asked, bundle.model.tokens_per_image(parts=1), room)
    # It is asked in the words that it was trained on.
    sample = DigitsPages(stage.data, 1)[0]
    trained = Encoder(tokenizer, stage.prompt, stage.images)(sample)
    assert trained.ids[: len(asked.ids)].tolist() == asked.ids.tolist()
