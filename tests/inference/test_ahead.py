"""Calls that are dispatched before the ones in front of them are read change no answer."""

import numpy as np
import pytest

import llava_mini_jax
from llava_mini_jax.inference import bounds, generate
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.model import Model
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


def stops(model: Model, how: dict) -> list[dict]:
    """No end but the allowance; a stop string in the middle of what is said."""
    answer = model.generate(QUESTIONS[0], images=tiny_model.picture(0), max_new_tokens=24, **how)
    words = answer.split()
    assert len(words) > 6
    return [{}, {"stop": [f"{words[4]} {words[5]}"]}]


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
