"""Judges behind a real HTTP server that does all that servers do; wording; nothing paid twice.

The server runs in a thread of the test; how it treats a request is a function of the request and of
how often that very request has come. It counts every chat completion that it gave away.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.judge import client, judging
from llava_mini_jax.evaluation.judge.http import Endpoint
from tests.evaluation import judged
from tests.evaluation.image import golden_sets as golden
from tests.evaluation.judge_server import KEY, completion, endpoint, number, plan, texts_of


def test_every_reply_is_kept_and_paid_for_once(serve, tmp_path):
    server = serve(lambda handler, body, nth: handler.give(200, completion(f"8 {number(body)}")))
    file, asks = tmp_path / "kept" / "replies.jsonl", plan(40)
    done = []
    first = client.ask(asks, endpoint(server), file, progress=done.append)
    assert texts_of(first) == {f"item{n}": [f"8 {n}"] for n in range(40)}
    assert first.sent == 40 == sum(server.paid.values()) == sum(done) and not first.pending
    assert server.keys == {f"Bearer {KEY}"}
    again = client.ask(asks, endpoint(server), file)
    offline = client.kept(asks, file)
    assert again == judging.Replies(plan=asks, by_key=first.by_key, pending={}) == offline
    assert sum(server.came.values()) == 40
    line = json.loads(file.read_text().splitlines()[0])
    assert line["response"]["model"] == "judge-0613"  # the raw reply, whole
    about = first.about()
    assert about["model"] == "gpt-test" and about["wording"] == "ours"
    assert about["model as the server calls it"] == ["judge-0613"]
    assert about["first reply"] <= about["last reply"] and about["sent now"] == 40


def test_asks_of_the_same_words_share_a_reply_but_rungs_do_not(serve, tmp_path):
    server = serve(lambda handler, body, nth: handler.give(200, completion(f"try {nth}")))
    asks = plan(6, rungs=3, readable=lambda text: text == "try 1", same=True)
    replies = client.ask(asks, endpoint(server), tmp_path / "r.jsonl")
    assert texts_of(replies) == {f"item{n}": ["try 0", "try 1"] for n in range(6)}
    assert sum(server.paid.values()) == 2


def hang(handler, body, nth):
    if nth == 0 and number(body) % 3 == 0:
        time.sleep(1.2)
    handler.give(200, completion("ok"))


def drip(handler, body, nth):
    """Bytes come, one by one, but never all of them."""
    if nth == 0 and number(body) % 3 == 0:
        with contextlib.suppress(OSError):
            for _ in range(1200):
                handler.wfile.write(b"H")
                time.sleep(0.05)
        handler.close_connection = True
        return
    handler.give(200, completion("ok"))


def drop(handler, body, nth):
    if nth < 2 and number(body) % 3 == 0:
        handler.connection.close()
        return
    handler.give(200, completion("ok"))


def garbage(handler, body, nth):
    broken = (b"<html>Bad gateway</html>", b'{"choices": []}')
    if nth < 2 and number(body) % 3 == 0:
        handler.give(200, broken[nth])
        return
    handler.give(200, completion("ok"))


def busy(handler, body, nth):
    if nth < 2 and number(body) % 3 == 0:
        handler.give((503, 500)[nth], b"")
        return
    handler.give(200, completion("ok"))


@pytest.mark.parametrize("treat", [hang, drip, drop, garbage, busy])
def test_troubles_that_pass(treat, serve, tmp_path):
    server, file, asks = serve(treat), tmp_path / "r.jsonl", plan(7)
    began = time.monotonic()
    replies = client.ask(asks, endpoint(server, timeout_s=0.4), file)
    assert time.monotonic() - began < 40  # drip sends for a minute: nobody waits for that
    assert texts_of(replies) == {f"item{n}": ["ok"] for n in range(7)}
    assert replies.sent == 7 and len(file.read_text().splitlines()) == 7
    assert max(server.came.values()) > 1  # there was trouble


def test_a_judge_that_refuses_is_asked_once_a_rung(serve, tmp_path):
    def refuse(handler, body, nth):
        refusals = (
            completion(None),
            completion(None, refusal="I cannot grade people."),
            {"choices": [{"message": {"role": "assistant", "refusal": "No."}}]},
        )
        handler.give(200, refusals[nth])

    server, file = serve(refuse), tmp_path / "r.jsonl"
    asks = plan(2, rungs=3, readable=lambda text: text != "")
    replies = client.ask(asks, endpoint(server), file)
    assert texts_of(replies) == {"item0": [""] * 3, "item1": [""] * 3}
    client.ask(asks, endpoint(server), file)
    assert sum(server.came.values()) == 6  # paid for, kept, not asked for again
    assert "I cannot grade people." in file.read_text()


def test_rate_limits_are_waited_out_by_all_threads(serve, tmp_path):
    def limit(handler, body, nth):
        with server.lock:
            first = not limited
            limited.append(1)
        time.sleep(0.05)
        if first:
            handler.give(429, {"error": {"code": "rate_limit_exceeded"}}, Retry_After="4")
        else:
            handler.give(200, completion("ok"))

    limited = []
    server = serve(limit)
    replies = client.ask(plan(30), endpoint(server), tmp_path / "r.jsonl")
    assert len(replies.by_key) == 30 and not replies.pending
    began = server.times[0]
    # What was under way comes through (within 2 s on the busiest machine); then nothing, until the
    # server's time is over.
    within = [moment for moment in server.times if 2 < moment - began < 3.9]
    assert not within and server.times[-1] - began > 3.9


def test_a_server_that_asks_for_too_long_a_wait_is_left(serve, tmp_path):
    server = serve(lambda handler, body, nth: handler.give(429, {}, Retry_After="3600"))
    began = time.monotonic()
    replies = client.ask(plan(30), endpoint(server), tmp_path / "r.jsonl")
    assert time.monotonic() - began < 60 and len(replies.pending) == 30
    assert "asks to wait for 3600 s" in replies.pending["item29"]
    assert sum(server.came.values()) <= 4


@pytest.mark.parametrize(
    "status, error",
    [
        (401, {"message": f"Incorrect API key provided: {KEY}", "code": "invalid_api_key"}),
        (404, {"message": "The model gpt-test does not exist"}),
        (429, {"message": "You exceeded your current quota", "code": "insufficient_quota"}),
    ],
)
def test_what_no_repetition_mends_stops_the_run(status, error, serve, tmp_path):
    server = serve(lambda handler, body, nth: handler.give(status, {"error": error}))
    replies = client.ask(plan(50), endpoint(server), tmp_path / "r.jsonl")
    assert len(replies.pending) == 50 and sum(server.came.values()) <= 4
    assert f"status {status}" in replies.pending["item49"]
    assert KEY not in str(replies.about())


def test_a_server_that_dies_half_way_costs_nothing_twice(serve, tmp_path):
    def die(handler, body, nth):
        with server.lock:
            dead = sum(server.paid.values()) >= 20
        if dead:
            handler.connection.close()
            return
        handler.give(200, completion("ok"))

    server, file, asks = serve(die), tmp_path / "r.jsonl", plan(60)
    replies = client.ask(asks, endpoint(server, tries=2), file)
    paid = sum(server.paid.values())
    assert len(replies.by_key) == paid == replies.sent and len(replies.pending) == 60 - paid
    assert "asks failed in a row" in replies.pending["item59"]
    assert sum(server.came.values()) < 60  # a dead server is left alone
    alive = serve(lambda handler, body, nth: handler.give(200, completion("ok")))
    replies = client.ask(asks, endpoint(alive), file)
    assert len(replies.by_key) == 60 and replies.sent == 60 - paid
    assert not server.paid.keys() & alive.paid.keys()


SCORING = """
import json, sys
from pathlib import Path
from llava_mini_jax.evaluation import benchmark
from llava_mini_jax.evaluation.judge import client
from llava_mini_jax.evaluation.run import answers
from llava_mini_jax.evaluation.judge.http import Endpoint
place, url, file = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
tool = benchmark.find("mmvet")
questions = tool.questions(place)
lines = answers.read_lines(place / "answers" / "golden-model.jsonl")
given = answers.join(tool, questions, lines).answers
plan = tool.judge.plan(questions, given)
replies = client.ask(plan, Endpoint(base_url=url, concurrency=4), file)
print(json.dumps(tool.score(place, questions, given, replies=replies).rules["official"].value))
"""


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_killed_at_random_it_repeats_nothing_that_was_kept(serve, tmp_path):
    canned = judged.read("mmvet/judge_replies.json")
    goal = None  # replies after which the server gives no more, so that the process is there still

    def grade(handler, body, nth):
        while goal is not None and sum(server.paid.values()) >= goal:
            time.sleep(0.01)
        tag = judged.tag(body["messages"][0]["content"])
        given = [canned[tag]] if isinstance(canned[tag], str) else canned[tag]
        # Which reply it is shows in the request: asked again at 0, 0.5, 1, ...
        again = "The grade, as a number" in body["messages"][0]["content"]
        rung = again + round(2 * body["temperature"])
        handler.give(200, completion(given[min(rung, len(given) - 1)]))

    server = serve(grade)
    place, file = golden.folder("mmvet", "llava", tmp_path), tmp_path / "replies.jsonl"
    command = [sys.executable, "-c", SCORING, str(place), server.url, str(file)]
    expected = golden.expected("mmvet")["mm_vet_evaluator"]["1_run"]
    total = expected["judge_calls"]
    for more in (total // 12, total // 6, total // 4):
        goal = sum(server.paid.values()) + more
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda end=goal: sum(server.paid.values()) >= end)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        goal = None  # what the server was about to give away is paid for too
        wait_until(lambda: sum(server.paid.values()) == sum(server.came.values()))
    with file.open("a") as half:
        half.write('{"digest": "0123')  # as a machine that lost its power might leave it
    before, kept = Counter(server.paid), file.read_text().count("\n")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == expected["capability_scores"]["total"]
    now = sum(server.paid.values()) - sum(before.values())
    assert now == total - kept  # what had been kept was not sent again
    # Twice were paid at most those that four threads had under way at each of three kills.
    assert sum(server.paid.values()) - total <= 3 * 4
    assert len(server.paid) == total == len(file.read_text().splitlines())


@pytest.mark.parametrize("name", ["concurrency", "tries", "timeout_s"])
def test_numbers_that_mean_nothing(name):
    with pytest.raises(InputError, match=f"{name} is 0"):
        Endpoint(base_url="http://localhost/v1", **{name: 0})


def test_two_processes_do_not_ask_the_same(serve, tmp_path):
    server, file = serve(hang), tmp_path / "r.jsonl"
    with client._locked(file), pytest.raises(InputError, match="another process"):
        client.ask(plan(1), endpoint(server), file)
    assert not server.came


def test_an_interrupt_sends_nothing_more(serve, tmp_path):
    server = serve(lambda handler, body, nth: handler.give(200, completion("ok")))

    def interrupt(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.ask(plan(500), endpoint(server), tmp_path / "r.jsonl", progress=interrupt)
    assert sum(server.came.values()) < 400
    kept = client.kept(plan(500), tmp_path / "r.jsonl")
    assert len(kept.by_key) == sum(server.paid.values())
    assert set(kept.pending.values()) == {"not asked yet"}


def test_an_interrupt_waits_for_no_server(serve, tmp_path):
    def slow(handler, body, nth):
        if number(body):
            handler.give(503, b"", Retry_After="30")
        else:
            time.sleep(0.2)
            handler.give(200, completion("ok"))

    def interrupt(done):
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        client.ask(plan(4), endpoint(serve(slow)), tmp_path / "r", progress=interrupt)
    assert time.monotonic() - began < 25
