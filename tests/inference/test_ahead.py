"""Calls that are under way while what the ones before them gave is told change no answer."""

import numpy as np
import pytest

import llava_mini_jax
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.lanes import Lanes
from llava_mini_jax.inference.model import Model
from llava_mini_jax.inference.session import Session
from tests import tiny, tiny_model

fast_compilation = tiny.fast_compilation

QUESTIONS = ("how many 7s are there?", "what is the largest digit?", "which digit is it?")
GREEDY, SAMPLED = {}, {"temperature": 1.3, "top_p": 0.9, "top_k": 20, "seed": 7}
TOKENS = 24


@pytest.fixture(scope="module")
def model() -> Model:
    return llava_mini_jax.load(tiny_model.folder("paper"))


@pytest.fixture
def under_way(monkeypatch) -> list[int]:
    """How many calls there are that nobody has read, whenever somebody is told."""
    counts: list[int] = []
    tell = Lanes.tell

    def watched(lanes: Lanes) -> list:
        if lanes._news:
            counts.append(len(lanes._calls))
        return tell(lanes)

    monkeypatch.setattr(Lanes, "tell", watched)
    return counts


def stops(model: Model, how: dict) -> list[dict]:
    """No end but the allowance; a stop string in the middle of what is said."""
    shown = {"images": tiny_model.picture(1), "max_new_tokens": TOKENS}
    words = model.generate(QUESTIONS[0], **shown, **how).split()
    assert len(words) > 6
    return [{}, {"stop": [f"{words[4]} {words[5]}"]}]


def conversation(model: Model, how: dict, closed: bool, steps: int) -> list:
    """What a session says, the first answer taken to its end or closed early."""
    session = Session(model, Settings(max_new_tokens=TOKENS, **how))
    session.show_image(tiny_model.picture(1))
    said = session.ask(QUESTIONS[0], steps=steps)
    found: list = [next(said) if closed else "".join(said)]
    said.close()
    for question in QUESTIONS[1:]:
        found += ["".join(session.ask(question, steps=steps)), session.answer]
        (lane,) = session._engine._lanes.lanes  # type: ignore
        marks = lane.slots[0].marks
        # What a call behind the end has written is not said to be there, or is.
        assert marks is not None and int(np.asarray(lane.state.used_B)[0]) >= len(marks)
    return found


@pytest.mark.parametrize("how", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("closed", [False, True], ids=["whole", "closed"])
def test_a_session_says_the_same(model, under_way, how, closed) -> None:
    for stop in stops(model, how):
        expected = conversation(model, how | stop, closed, 1)
        under_way.clear()
        for steps in (2, 8, 64):
            assert conversation(model, how | stop, closed, steps) == expected
        assert max(under_way) == 1


def test_ctrl_c_while_a_call_is_read(model, monkeypatch) -> None:
    """The next answer is that of a session that was never interrupted."""

    def second(interrupt: bool) -> list[str]:
        session = Session(model, Settings(max_new_tokens=12))
        session.show_image(tiny_model.picture(1))
        said = session.ask(QUESTIONS[0])
        first = [next(said), next(said)]
        if interrupt:
            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):

                def interrupted(*_: Lanes, **__: bool) -> int:
                    raise KeyboardInterrupt

                patched.setattr(Lanes, "fetch", interrupted)
                list(said)
        said.close()
        return [*first, *session.ask(QUESTIONS[1])]

    assert second(True) == second(False)
