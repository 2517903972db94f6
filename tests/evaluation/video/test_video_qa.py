"""MSVD-QA, MSRVTT-QA, ActivityNet-QA: golden figures, verdicts and requests; what data breaks."""

import dataclasses
import hashlib
import json
import shutil
from functools import partial

import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation import benchmark
from llava_mini_jax.evaluation.judge import own_texts
from llava_mini_jax.evaluation.judge.judging import Reply, replies_of
from llava_mini_jax.evaluation.judge.video_verdict import read_official, read_tolerant
from llava_mini_jax.evaluation.run import answers
from tests.evaluation import judged

FOLDERS = {
    "msvd_qa": "MSVD_Zero_Shot_QA",
    "msrvtt_qa": "MSRVTT_Zero_Shot_QA",
    "activitynet_qa": "ActivityNet_Zero_Shot_QA",
}


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def asked(name, tmp_path, **options):
    """Folder, benchmark, questions, answers from the release's file, replies, what was sent."""
    place = tmp_path / FOLDERS[name]
    if not place.exists():
        shutil.copytree(judged.GOLDEN / "video_qa" / FOLDERS[name], place)
    found = benchmark.find(name)
    questions = found.questions(place)
    joined = answers.join(found, questions, found.from_rows(rows_of(place / "merge.jsonl")))
    assert not joined.unknown and not joined.repeated
    plan = found.judge.plan(questions, joined.answers, **options)
    canned = judged.read(f"video_qa/{FOLDERS[name]}/judge_replies.json")
    return place, found, questions, joined.answers, *judged.judged(plan, canned)


@pytest.mark.parametrize("name", FOLDERS)
def test_golden_figures(name, tmp_path):
    place, found, questions, given, replies, canned = asked(name, tmp_path)
    expected = judged.read("video_qa/expected.json")["results"][found.title]
    scores = found.score(place, questions, given, replies=replies)
    official = scores.rules["official"]
    assert official.value == pytest.approx(100 * expected["accuracy"], **judged.CLOSE)
    for field in ("yes_count", "no_count", "average_score", "judged"):
        assert official.details[field] == pytest.approx(expected[field], **judged.CLOSE)
    assert sorted(official.details["never judged"]) == expected["never_judged_ids"]
    assert set(expected["never_judged_ids"]) <= set(scores.unparsed)
    assert len(official.details["no answer"]) == expected["questions"] - expected["predictions"]
    assert len(questions) == expected["questions"] and len(given) == expected["predictions"]
    assert sum(map(len, canned.requests.values())) == expected["judge_calls"]
    for rule in ("all questions", "tolerant"):
        assert set(scores.rules[rule].items) == {q.key for q in questions}
    whole = scores.rules["all questions"]
    assert whole.value == pytest.approx(100 * expected["yes_count"] / expected["questions"])
    total = expected["average_score"] * expected["judged"]
    assert whole.details["average_score"] == pytest.approx(total / expected["questions"])


@pytest.mark.parametrize("name", FOLDERS)
def test_golden_verdicts(name, tmp_path):
    place, found, questions, given, replies, _ = asked(name, tmp_path)
    (path,) = found.judge.write(replies, tmp_path / "out", "m")
    expected = judged.read(f"video_qa/{FOLDERS[name]}/expected_combined.json")
    assert json.loads(path.read_text()) == expected
    scores = found.score(place, questions, given, replies=replies)
    assert set(scores.parsed) == set(expected)


@judged.needs_wording
@pytest.mark.parametrize("name", FOLDERS)
def test_golden_requests_with_the_official_wording(name, tmp_path):
    *_, replies, canned = asked(name, tmp_path, wording=judged.wording("video_qa.json"))
    path = f"video_qa/{FOLDERS[name]}/expected_judge_requests.json"
    judged.check_requests(canned, judged.read(path))
    assert replies.about()["wording"] == "official"


@pytest.mark.parametrize("name", FOLDERS)
def test_golden_requests_but_for_the_words(name, tmp_path):
    _, _, questions, given, replies, canned = asked(name, tmp_path)
    expected = judged.read(f"video_qa/{FOLDERS[name]}/expected_judge_requests.json")

    def parts(tag):
        question = next(q for q in questions if tag in q.text)
        return question.text, question.gold["answer"], given[question.key].text

    judged.check_layout(canned, expected, parts)
    digest = own_texts.VIDEO_QA_SHA256["system"]
    assert {one["message_sha256"][0] for sent in expected.values() for one in sent} == {digest}
    assert replies.about()["wording"] == "ours"


def test_temperature_is_an_option(tmp_path):
    *_, canned = asked("msvd_qa", tmp_path, options={"temperature": None})
    for requests in canned.requests.values():
        assert "temperature" not in requests[0].body
    with pytest.raises(InputError, match="no option heat"):
        asked("msvd_qa", tmp_path, options={"heat": 1})


def test_predictions_as_the_release_writes_them(tmp_path):
    place, found, questions, given, *_ = asked("msvd_qa", tmp_path)
    n = len(questions)
    with pytest.raises(InputError, match=f"{n - len(given)} of {n} questions have no answer"):
        found.submission(place, questions, given, tmp_path)
    answered = [question for question in questions if question.key in given]
    (path,) = found.submission(place, answered, given, tmp_path)
    assert path.read_text() == (place / "merge.jsonl").read_text()


def test_both_ways_to_ask(tmp_path):
    place, found, questions, given, replies, _ = asked("msvd_qa", tmp_path)

    def style(given):
        rules = found.score(place, questions, given, replies=replies).rules
        return rules["official"].details["asked with"]

    assert style(given) == "not recorded"  # in the release's file
    bare = {q.key: ours(q, given[q.key]) for q in questions if q.key in given}
    assert style(bare) == "bare question" and questions[0].text == questions[0].prompt
    (place / "instruction.txt").write_bytes(b"Say it in a sentence.\n\n")
    (question, *_) = found.questions(place)
    assert question.text == "Say it in a sentence.\n\n" + questions[0].text
    assert question.prompt == questions[0].prompt
    digest = hashlib.sha256(b"Say it in a sentence.\n\n").hexdigest()
    mixed = {**bare, question.key: ours(question, given[question.key])}
    assert style(mixed) == f"bare question, instruction {digest[:12]}"


def ours(question, answer):
    """The answer as our own file would have it."""
    line = answers.line_of(question, answer.text, answer_id="a", model_id="m", cut=False)
    return dataclasses.replace(answer, prompt=line["prompt"], line=line)


def test_answers_to_other_questions_are_refused(tmp_path):
    place, found, questions, given, replies, _ = asked("msvd_qa", tmp_path)
    (place / "instruction.txt").write_bytes(b"Say it in a sentence.\n\n")
    questions = found.questions(place)
    found.judge.plan(questions, given)  # recorded is the bare question, as in golden files
    key, answer = next(iter(given.items()))
    full = {key: dataclasses.replace(answer, prompt=f"Say it.\n{answer.prompt}")}
    found.judge.plan(questions, given | full)  # or all of the prompt
    other = given | {key: dataclasses.replace(answer, prompt="What else?")}
    for use in (found.judge.plan, partial(found.score, place, replies=replies)):
        with pytest.raises(InputError, match=f"other questions .* same id: {key}"):
            use(questions, other)


def test_videos(tmp_path):
    place, found, questions, *_ = asked("activitynet_qa", tmp_path)
    rows = json.loads((place / "test_q.json").read_text())
    first, second, *_ = dict.fromkeys(row["video_name"] for row in rows)
    assert questions[0].video == place / "videos" / f"{first}.mp4"
    for file in (f"videos/v_{first}.mkv", f"test_videos/{second}.avi", "all_test/x.mp4"):
        (place / file).parent.mkdir(exist_ok=True)
        (place / file).touch()
    again = zip(rows, found.questions(place), strict=True)
    videos = {row["video_name"]: question.video for row, question in again}
    assert videos[first] == place / "videos" / f"v_{first}.mkv"
    assert videos[second] == place / "test_videos" / f"{second}.avi"


@pytest.mark.parametrize(
    "file, change, says",
    [
        ("test_a.json", lambda rows: rows[1:], "{n} questions, .* {less} answers"),
        ("test_a.json", lambda rows: [rows[1], rows[0], *rows[2:]], "differ in item 1"),
        ("test_a.json", lambda rows: [{**rows[0], "answer": 3}, *rows[1:]], '"answer" is 3'),
        (
            "test_q.json",
            lambda rows: [{k: v for k, v in row.items() if k != "question_id"} for row in rows],
            "differ in item 1",
        ),
        ("test_q.json", lambda rows: [{"question": "?"}, *rows[1:]], "video_name"),
        ("test_q.json", lambda rows: {"a": rows}, "expected a list"),
    ],
)
def test_broken_data(file, change, says, tmp_path):
    place, found, *_ = asked("msvd_qa", tmp_path)
    path = place / file
    rows = json.loads(path.read_text())
    path.write_text(json.dumps(change(rows)))
    with pytest.raises(InputError, match=says.format(n=len(rows), less=len(rows) - 1)):
        found.questions(place)
    path.unlink()
    with pytest.raises(InputError, match=f"there is no .*{file}"):
        found.questions(place)


def test_duplicate_ids(tmp_path):
    place, found, *_ = asked("msvd_qa", tmp_path)
    for file in ("test_q.json", "test_a.json"):
        rows = json.loads((place / file).read_text())
        rows[1]["question_id"] = rows[0]["question_id"]
        (place / file).write_text(json.dumps(rows))
    with pytest.raises(InputError, match=rows[0]["question_id"]):
        found.questions(place)


@pytest.mark.parametrize(
    "reply, official, tolerant",
    [
        ("{'pred': 'yes', 'score': 4.8}", (True, 4), (True, 4.8)),
        ("{'pred': 'yes', 'score': '3'}", (True, 3), (True, 3)),
        ("{'pred': 'yes', 'score': '4.5'}", (None, None), (True, 4.5)),
        ("{'pred': 'unknown', 'score': 2}", (False, 2), (None, 2)),
        ("{'pred': 'yes and no', 'score': 3}", (True, 3), (None, 3)),
        ("{'pred': 'maybe', 'score': 2}", (None, 2), (None, 2)),
        ("{'pred': True, 'score': 4}", (None, 4), (True, 4)),
        ('{"pred": true, "score": 4}', None, (True, 4)),
        ("{'pred': 'yes'}", (None, None), (True, None)),
        ("{'score': 9, 'pred': 'no'}", (False, 9), (False, None)),
        ("Sure! {'pred': 'no', 'score': 4}", None, (False, 4)),
        ("```python\n{'pred': 'no', 'score': 0}\n```", None, (False, 0)),
        ("Yes. Score: 4", None, (True, 4)),
        ("5", (None, None), (None, None)),
        ("{'pred': {1, 2}}", None, (None, None)),  # what no result file can hold is asked again
        ("None", (None, None), (None, None)),
        ("", None, (None, None)),
        ("(" * 9999, None, (None, None)),
    ],
)
def test_readers(reply, official, tolerant):
    verdict = read_official(reply)
    assert (verdict and (verdict.right, verdict.score)) == official
    verdict = read_tolerant([Reply(text=reply, model="", date="")])
    assert (verdict.right, verdict.score) == tolerant


def test_ten_rounds(tmp_path):
    *_, replies, _ = asked("msvd_qa", tmp_path)
    for ask in replies.plan.asks:
        assert len({request.digest for request in ask.requests}) == 10 == len(ask.requests)
    for text, rounds in (("no verdict", 10), ("[]", 1)):  # the second is readable, if of no use
        said = replies_of(replies.plan, lambda r, text=text: Reply(text=text, model="", date=""))
        assert {len(own) for own in said.by_key.values()} == {rounds}
