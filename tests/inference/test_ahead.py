"""Calls that are dispatched before the ones in front of them are read change no answer."""

import dataclasses

import numpy as np
import pytest

import llava_mini_jax
from llava_mini_jax.inference import bounds, generate
from llava_mini_jax.inference.answer import Answer, Settings
from llava_mini_jax.inference.model import Answering, Model
from llava_mini_jax.inference.session import Session
from tests import tiny_model

QUESTIONS = ("how many 7s are there?", "what is the largest digit?", "which digit is it?")
GREEDY, SAMPLED = {}, {"temperature": 1.3, "top_p": 0.9, "top_k": 20, "seed": 7}


@pytest.fixture(scope="module")
def model() -> Model:
    return llava_mini_jax.load(tiny_model.folder("paper"))


@pytest.fixture
def unread(monkeypatch) -> list[int]:
    """How many calls there are that nobody has read, when one is read."""
    counts: list[int] = []
    read = generate.Calls.read

    def watched(calls: generate.Calls) -> np.ndarray:
        counts.append(len(calls.unread))
        return read(calls)

    monkeypatch.setattr(generate.Calls, "read", watched)
    return counts


def one_at_a_time(monkeypatch) -> None:
    monkeypatch.setattr(bounds, "runs_ahead", lambda settings, steps: False)


def requests(model: Model, count: int) -> list:
    pictures = [model.read_pictures(tiny_model.picture(n), None) for n in range(count)]
    return [model.request(q, p) for q, p in zip(QUESTIONS, pictures, strict=False)]


def stops(model: Model, how: dict) -> list[dict]:
    """No end but the allowance; a stop string in the middle of what is said; a stop token there."""
    (answer,) = model.answer_requests(
        requests(model, 1), Settings(max_new_tokens=24, **how), batch_size=1
    )
    words = answer.text.split()
    assert len(words) > 6
    return [{}, {"stop": [f"{words[4]} {words[5]}"]}]


def pieces(model: Model, rows: int, steps: int, how: dict) -> tuple[list, list[Answer]]:
    run = Answering(model, requests(model, rows), Settings(max_new_tokens=24, **how), steps)
    return list(run), run.answers


@pytest.mark.parametrize("how", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_pieces_and_answers_are_the_same(model, monkeypatch, unread, how, rows, steps) -> None:
    for stop in stops(model, how):
        unread.clear()
        found = pieces(model, rows, steps, how | stop)
        ahead = not stop or steps <= bounds.STEPS_STREAMING
        assert max(unread) == (2 if ahead else 1)
        with monkeypatch.context() as patched:
            one_at_a_time(patched)
            unread.clear()
            assert pieces(model, rows, steps, how | stop) == found
            assert max(unread) == 1


def ending(model: Model, token: int) -> Model:
    """The model, whose answers end at this token, which the device knows of."""
    ended = Model(model.params, model.bundle, model.tokenizer, model.buckets)
    ended.__dict__["stop_ids"] = (token,)
    return ended


@pytest.mark.parametrize("rows", [1, 3])
def test_a_stop_token_ends_the_call_ahead_too(model, monkeypatch, rows) -> None:
    run = Answering(model, requests(model, rows), Settings(max_new_tokens=24), 2)
    list(run)
    ended = ending(model, run._texts[0].ids[5])
    found = pieces(ended, rows, 2, {})
    assert found[1][0].finish == "stop" and found[1][0].tokens <= 5
    one_at_a_time(monkeypatch)
    assert pieces(ended, rows, 2, {}) == found


def test_rows_of_other_allowances(model, monkeypatch, unread) -> None:
    """A row that is cut by the model's positions ends before the others do."""
    short = llava_mini_jax.load(tiny_model.folder("paper", positions=64))
    long = dataclasses.replace(requests(short, 1)[0])
    fill = np.concatenate([long.ids, np.full(8, long.ids[-1])])
    long = dataclasses.replace(
        long, ids=fill, fuse=fill >= 0, labels=np.full(len(fill), -100, np.int32)
    )
    examples = [requests(short, 1)[0], long]

    def answers() -> list[Answer]:
        settings = Settings(max_new_tokens=bounds.longest_prompt(short.bundle))
        run = Answering(short, examples, settings, 4)
        list(run)
        return run.answers

    found = answers()
    assert found[0].tokens == found[1].tokens + 8 and found[0].finish == "context"
    assert max(unread) == 2
    one_at_a_time(monkeypatch)
    assert answers() == found


def conversation(model: Model, how: dict, closed: bool) -> list:
    """What a session says and keeps, the first answer taken to its end or closed early."""
    session = Session(model, Settings(max_new_tokens=24, **how))
    session.show_image(tiny_model.picture(1))
    said = session.ask(QUESTIONS[0])
    kept: list = [[next(said), next(said)] if closed else list(said)]
    said.close()
    kept.append(session._cached.tolist())
    for question in QUESTIONS[1:]:
        kept += [list(session.ask(question)), session.answer, session._cached.tolist()]
        cache = session._cache
        assert np.asarray(cache.valid_BS)[0, : len(session._cached)].all()
    return kept


@pytest.mark.parametrize("how", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("closed", [False, True], ids=["whole", "closed"])
def test_a_session_says_and_keeps_the_same(model, monkeypatch, unread, how, closed) -> None:
    for stop in stops(model, how):
        unread.clear()
        found = conversation(model, how | stop, closed)
        assert max(unread) == 2
        with monkeypatch.context() as patched:
            one_at_a_time(patched)
            assert conversation(model, how | stop, closed) == found


def test_ctrl_c_while_a_call_is_read(model, monkeypatch) -> None:
    """The next answer is that of a session that was never interrupted."""

    def second(interrupt: bool) -> list[str]:
        session = Session(model, Settings(max_new_tokens=12))
        session.show_image(tiny_model.picture(1))
        said = session.ask(QUESTIONS[0])
        first = [next(said), next(said)]
        if interrupt:
            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):

                def interrupted(_: generate.Calls) -> np.ndarray:
                    raise KeyboardInterrupt

                patched.setattr(generate.Calls, "read", interrupted)
                list(said)
        said.close()
        return [*first, *session.ask(QUESTIONS[1])]

    assert second(True) == second(False)
