"""EgoSchema: every golden figure and prompt, from merged and from official files; the upload."""

import dataclasses
import json
import random

import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation import benchmark
from llava_mini_jax.evaluation.run import answers
from llava_mini_jax.evaluation.video import egoschema
from tests.evaluation.image.golden_sets import CLOSE, GOLDEN, expected
from tests.evaluation.image.test_broken_data import break_file
from tests.evaluation.video import test_mvbench as videos


def lines(missing_too=False):
    rows = [json.loads(line) for line in (GOLDEN / "egoschema" / "predictions.jsonl").open()]
    return [
        {"question_id": row["q_uid"], "text": row["output"]}
        for row in rows
        if missing_too or row["video_present"]
    ]


def read_by_release(scores, key):
    """0 to 4, -1 for none, or None without an answer."""
    letter = scores.readings["first_letter"].get(key)
    return None if letter is None else "ABCDE".index(letter) if letter else -1


@pytest.fixture(params=["merged", "official"])
def place(request, tmp_path):
    """The golden folder with what the release wants, or with the official files."""
    found = videos.folder("egoschema", tmp_path)
    unwanted = {"merged": ("questions", "subset_answers"), "official": ("mc",)}[request.param]
    for name in unwanted:
        (found / f"{name}.json").unlink()
    return found


def test_golden_figures(place):
    wanted = expected("egoschema")
    questions, scores = videos.scored("egoschema", place, lines())
    rules, release = scores.rules, wanted["llava_mini"]
    assert scores.headline == "letter" and len(questions) == wanted["n"]
    printed = release["printed_ACC_missing_videos_count_as_wrong"]
    assert rules["first_letter"].value == pytest.approx(100 * printed, **CLOSE)
    answered = release["accuracy_over_answered"]
    assert rules["answered_only"].value == pytest.approx(100 * answered, **CLOSE)
    absent = sum(not item["video_present"] for item in wanted["per_item"].values())
    assert rules["first_letter"].details == {"missing": absent, "hidden": 0}
    texts = {line["question_id"]: line["text"] for line in lines(missing_too=True)}
    for question in questions:
        item = wanted["per_item"][question.key]
        assert read_by_release(scores, question.key) == item["llava_mini_pred"]
        assert question.gold["answer"] == item["answer"]
        assert rules["first_letter"].items[question.key] == (item["llava_mini_acc"] or 0)
        read = egoschema.read_lmms(texts[question.key], question.gold["options"])
        assert read == (None if item["lmms_eval_pred"] == "random" else item["lmms_eval_pred"])
        if item["video_present"]:
            assert question.text == item["prompt"]
            part = 0.2 if read is None else float(read == item["answer"])
            assert rules["lmms_eval"].items[question.key] == part
    drawn = [i for i in wanted["per_item"].values() if i["lmms_eval_pred"] == "random"]
    present = sum(i["video_present"] for i in drawn)
    assert rules["lmms_eval"].details["drawn_at_random"] == present
    assert set(scores.unparsed) == {key for key, read in scores.parsed.items() if read == -1}


def test_submission(place, tmp_path):
    found = benchmark.find("egoschema")
    questions = found.questions(place)
    some = answers.join(found, questions, lines()[1:])
    message = f"{len(some.missing)} of {len(questions)} questions have no answer: {some.missing[0]}"
    with pytest.raises(InputError, match=message):
        found.submission(place, questions, some.answers, tmp_path / "out")
    given = answers.join(found, questions, lines(missing_too=True)).answers

    def written(given):
        paths = found.submission(place, questions, given, tmp_path / "out")
        return [json.loads(path.read_text()) for path in paths]

    ours, alone = written(given)
    assert alone.keys() == ours.keys()
    first = questions[0].key
    told = {**given, first: dataclasses.replace(given[first], text="Answer: B")}
    assert [read[first] for read in written(told)] == [0, 1]
    golden = expected("egoschema")["submission_from_llava_mini_rule"]
    for uid, number in golden.items():
        if number is not None:  # two without a video
            assert ours[uid] == max(number, 0), uid  # the server takes no -1
    assert set(ours) == set(golden) and set(ours.values()) <= {0, 1, 2, 3, 4}


def test_the_full_set_asks_all_and_scores_those_that_are_known(tmp_path):
    place = videos.folder("egoschema", tmp_path)
    subset = place / "subset_answers.json"
    every = json.loads(subset.read_text())
    known = dict(list(every.items())[: len(every) // 4])
    subset.write_text(json.dumps(known))
    (place / "mc.json").unlink()
    assert len(benchmark.find("egoschema").questions(place)) == len(known)
    questions, scores = videos.scored("egoschema_full", place, lines())
    wanted = expected("egoschema")["per_item"]
    right = sum(wanted[uid]["llava_mini_acc"] or 0 for uid in known)
    rule = scores.rules["first_letter"]
    missing = sum(not wanted[uid]["video_present"] for uid in known)
    assert rule.details == {"missing": missing, "hidden": len(wanted) - len(known)}
    assert rule.value == pytest.approx(100 * right / len(known), **CLOSE)
    subset.unlink()
    questions, scores = videos.scored("egoschema_full", place, lines())
    assert len(questions) == len(wanted) and scores.rules["first_letter"].value is not None
    assert not scores.rules["first_letter"].items
    with pytest.raises(InputError, match=r"egoschema: there is no .*subset_answers.json; get it"):
        benchmark.find("egoschema").questions(place)


def test_videos(place):
    (place / "videos").mkdir()
    uid = egoschema.BENCHMARK.questions(place)[0].key
    for video in (f"{uid}.mp4", f"{uid}.avi"):
        found = egoschema.BENCHMARK.questions(place)[0].video
        assert found == place / "videos" / f"{uid}.mp4"
        (place / "videos" / video).touch()
    (place / "videos" / f"{uid}.mp4").unlink()
    assert egoschema.BENCHMARK.questions(place)[0].video.name == f"{uid}.avi"


@pytest.mark.parametrize(
    ("text", "number"),
    [("(C) or (B)", 2), ("B. yes A. no", 1), ("x D y (A)", 3), ("f g h E", 4), ("faces", None)],
)
def test_read_lmms(text, number):
    assert egoschema.read_lmms(text, ["one", "two", "three", "four", "five"]) == number


def test_read_lmms_takes_a_whole_option_from_a_long_answer():
    options = ["eats", "sews", "cooks rice", "reads", "sleeps"]
    assert egoschema.read_lmms("she takes a pot, c. cooks rice and more", options) == 2
    assert egoschema.read_lmms("it is c. cooks rice", options) is None  # five words
    assert egoschema.read_lmms("first a. eats, then she d. reads a bit", options) == 0


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("questions", lambda rows, uid: rows[0].pop("option 3"), '0: "option 3" is nothing'),
        ("questions", lambda rows, uid: rows.append(rows[0]), "1 questions appear twice: {uid}"),
        ("questions", lambda rows, uid: rows.pop(0), "1 answers belong to no question .*: {uid}"),
        ("subset_answers", lambda rows, uid: rows.update({uid: 5}), "answer to {uid} is 5; exp"),
    ],
)
def test_broken_files_are_refused(file, change, message, tmp_path):
    place = videos.folder("egoschema", tmp_path)
    (place / "mc.json").unlink()
    rows = json.loads((place / f"{file}.json").read_text())
    uid = egoschema.BENCHMARK.questions(place)[0].key
    if isinstance(rows, list):  # the first one may be of those whose answers are hidden
        rows.sort(key=lambda row: row["q_uid"] != uid)
    change(rows, uid)
    (place / f"{file}.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=message.format(uid=uid)):
        egoschema.BENCHMARK.questions(place)


def test_files_broken_at_random(tmp_path):
    place, rng, refused = videos.folder("egoschema", tmp_path), random.Random(0), 0
    (place / "mc.json").unlink()
    n = expected("egoschema")["n"]
    for _ in range(60):
        path = place / rng.choice(("questions.json", "subset_answers.json"))
        whole = path.read_bytes()
        break_file(path, rng)
        try:
            questions, scores = videos.scored("egoschema", place, lines())
            assert len(scores.rules["first_letter"].items) == len(questions) >= n - 1
        except InputError:
            refused += 1
        path.write_bytes(whole)
    assert refused > 20
