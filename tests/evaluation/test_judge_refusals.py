"""Requests that a judge's server refuses for good: kept, counted and told; others stay pending."""

import json
import shutil

import pytest

import eval as eval_program
from llava_mini_jax.evaluation.judge import client
from llava_mini_jax.evaluation.video import video_chatgpt
from tests import golden_data
from tests.evaluation.judge_server import completion, endpoint, number, plan, texts_of

FILTERED = {"error": {"code": "content_filter", "message": "filtered"}}


def refusing(status, items, error=FILTERED, after=0):
    """Refuses these items from their request number `after` on."""

    def treat(handler, body, nth):
        if number(body) in items and nth >= after:
            handler.give(status, error)
        else:
            handler.give(200, completion("ok" if number(body) not in items else "hm"))

    return treat


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refusal_is_kept_and_not_asked_again(status, serve, tmp_path):
    server, file = serve(refusing(status, {0, 3})), tmp_path / "r.jsonl"
    asks = plan(12, rungs=3, readable=lambda text: text == "ok")
    replies = client.ask(asks, endpoint(server), file)
    assert not replies.pending and sum(server.came.values()) == 12  # no rung is climbed after it
    assert texts_of(replies) == {f"item{n}": ["" if n in (0, 3) else "ok"] for n in range(12)}
    about = replies.about()
    reason = f"status {status}: content_filter; filtered"
    assert about["refused"] == 2 and about["first of the refused"] == dict.fromkeys(
        ("item0", "item3"), reason
    )
    assert about["replies"] == 10 and about["model as the server calls it"] == ["judge-0613"]
    again = client.ask(asks, endpoint(server), file)
    assert again.by_key == replies.by_key == client.kept(asks, file).by_key
    assert sum(server.came.values()) == 12
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["response"] for line in lines if "refused" in line] == [FILTERED] * 2


def test_a_refusal_after_other_rungs_ends_the_ladder(serve, tmp_path):
    server = serve(refusing(400, {1}, after=2))
    asks = plan(3, rungs=5, readable=lambda text: text == "ok")
    replies = client.ask(asks, endpoint(server), tmp_path / "r.jsonl")
    assert texts_of(replies)["item1"] == ["hm", "hm", ""] and not replies.pending


def test_a_server_that_refuses_everything_has_been_asked_wrongly(serve, tmp_path):
    error = {"error": {"message": "Unsupported parameter: 'max_tokens'"}}
    server, file = serve(refusing(400, range(40), error)), tmp_path / "r.jsonl"
    replies = client.ask(plan(40), endpoint(server), file)
    assert len(replies.pending) == 40 and "max_tokens" in replies.pending["item39"]
    assert sum(server.came.values()) < 20 and not file.exists()
    few = client.ask(plan(2), endpoint(server), file)
    assert len(few.pending) == 2 and not file.exists()
    mended = serve(refusing(400, {7}))
    replies = client.ask(plan(40), endpoint(mended), file)
    assert not replies.pending and replies.about()["refused"] == 1


def test_many_refusals_in_a_row_stop_nothing(serve, tmp_path):
    server = serve(refusing(400, range(1, 31)))
    asks = plan(40)
    replies = client.ask(asks, endpoint(server, concurrency=1), tmp_path / "r.jsonl")
    assert not replies.pending and replies.about()["refused"] == 30


def test_a_server_that_answers_nothing_any_more_is_no_judge_of_items(serve, tmp_path):
    """An account that is empty is a 400 at some."""
    empty, file = serve(refusing(400, {5, *range(20, 40)})), tmp_path / "r.jsonl"
    replies = client.ask(plan(40), endpoint(empty, concurrency=1), file)
    assert replies.pending == {f"item{n}": replies.pending["item20"] for n in range(20, 40)}
    assert replies.about()["refused"] == 1 and len(file.read_text().splitlines()) == 20
    filled = serve(refusing(400, {5}))
    replies = client.ask(plan(40), endpoint(filled), file)
    assert not replies.pending and replies.sent == 20


def test_what_is_left_of_a_run_may_all_be_refused(serve, tmp_path):
    file, asks = tmp_path / "r.jsonl", plan(12)

    def busy(handler, body, nth):
        handler.give(*((503, b"") if number(body) == 3 else (200, completion("ok"))))

    assert client.ask(asks, endpoint(serve(busy)), file).pending.keys() == {"item3"}
    replies = client.ask(asks, endpoint(serve(refusing(400, {3}))), file)
    assert not replies.pending and replies.about()["refused"] == 1


@pytest.mark.parametrize("status", [403, 409, 503])
def test_other_errors_stay_pending(status, serve, tmp_path):
    server = serve(refusing(status, {3}))
    replies = client.ask(plan(12), endpoint(server), tmp_path / "r.jsonl")
    assert replies.pending.keys() == {"item3"} and replies.about()["refused"] == 0


GRADES = {"llava_bench": "8 7", "mmvet": "0.5", "msvd_qa": "{'pred': 'yes', 'score': 4}"}
GRADES["video_chatgpt"] = GRADES["msvd_qa"]
FOLDERS = {  # in the golden sets, in a folder of data; the answers in it
    "llava_bench": ("llava_bench", "llava-bench-in-the-wild", "answers/golden-model.jsonl"),
    "mmvet": ("mmvet", "mm-vet", "answers/golden-model.jsonl"),
    "msvd_qa": (
        "video_qa/MSVD_Zero_Shot_QA",
        "GPT_Zero_Shot_QA/MSVD_Zero_Shot_QA",
        "merge.jsonl",
    ),
    "video_chatgpt": ("video_chatgpt_generative", "video_chatgpt_generative", "all.jsonl"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_benchmarks_take_a_refusal_for_a_reply_that_cannot_be_read(name, serve, tmp_path, capsys):
    def grade(handler, body, nth):
        refused = len(server.came) == 5  # requests, of which this is the last one
        handler.give(*((400, FILTERED) if refused else (200, completion(GRADES[name]))))

    server = serve(grade)
    source, target, answers = FOLDERS[name]
    data = tmp_path / "data" / target
    shutil.copytree(golden_data.OWN / "eval" / source, data)
    if name == "video_chatgpt":
        parts = (data / f"predictions/{kind}_qa.jsonl" for kind in video_chatgpt._SETS)
        (data / answers).write_text("".join(path.read_text() for path in parts))
    argv = ["--benchmarks", name, "--data", tmp_path / "data", "--answers", data / answers]
    argv += ["--out", tmp_path, "--judge-url", server.url, "--judge-concurrency", 1]
    assert eval_program.main(list(map(str, argv))) == 0
    out = capsys.readouterr().out
    assert "the judge's server refused 1 of " in out and "content_filter; filtered" in out
    (found,) = json.loads((tmp_path / "results.json").read_text())
    (judge,) = {json.dumps(rule["details"]["judge"]) for rule in found["rules"].values()}
    (key,) = json.loads(judge)["first of the refused"]
    assert any(key.startswith(lost) for lost in found["not_parsed"])
    rules, n = {rule: one["value"] for rule, one in found["rules"].items()}, found["asked"]
    if name == "llava_bench":
        left_out = {rule: n - one["details"]["counted"] for rule, one in found["rules"].items()}
        assert left_out == {"official": 0, "without unread": 1, "tolerant": 1}  # [-1, -1] counts
    elif name == "mmvet":
        assert rules["official"] == rules["tolerant"] == pytest.approx(50 * (n - 1) / n, abs=0.06)
    else:  # official scripts leave it out
        assert rules["official"] == (100 if name == "msvd_qa" else 4)
        assert rules["all questions"] < rules["official"]
