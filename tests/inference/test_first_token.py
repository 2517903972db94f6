"""The first token is there behind the prompt, and no step is computed that no token needs."""

import numpy as np
import pytest

import llava_mini_jax
from llava_mini_jax.inference import slots
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.model import Model
from llava_mini_jax.inference.sampling import make_sampling
from llava_mini_jax.inference.session import Session
from llava_mini_jax.reproduce import stepwise
from tests import tiny, tiny_model
from tests.inference.steps import said

fast_compilation = tiny.fast_compilation

QUESTION = "how many 7s are there?"
SAMPLED = {"temperature": 1.3, "top_p": 0.9, "top_k": 20, "seed": 7}


@pytest.fixture(scope="module")
def model() -> Model:
    return llava_mini_jax.load(tiny_model.folder("paper"))


def request(model: Model, question: str = QUESTION):
    return model.request(question, model.read_pictures(tiny_model.picture(1), None))


def one_by_one(model: Model, count: int, **how) -> list[int]:
    """The tokens of an answer, each by a call of its own."""
    how = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0} | how
    sampling = make_sampling(1, **how, stop_ids=())
    return stepwise.answers(model, [request(model)], sampling, count).tokens_BN[0].tolist()


@pytest.mark.parametrize("how", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("steps", [1, 2, 8, 64])
def test_the_tokens_are_those_of_decoding_alone(model, how, steps) -> None:
    settings = Settings(max_new_tokens=9, **how)
    heard = said(model, [request(model)], settings, steps=steps)
    assert heard.ids[0] == one_by_one(model, 9, **how)
    counts = [piece.count for piece in heard.steps[0]]
    assert counts[0] == 1 and sum(counts) == 9 and max(counts) <= max(steps, 1)


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, list[int]]]:
    """(rows that are told, tokens that each call of the engine's decode has given them)."""
    given: list = []
    decode = slots.decode

    def watched(*arguments):
        lane, told = decode(*arguments)
        given.append((np.asarray(told.tokens_BN) >= 0).sum(axis=1).tolist())
        return lane, told

    monkeypatch.setattr(slots, "decode", watched)
    return given


@pytest.mark.parametrize("allowance", [1, 2, 5])
def test_no_step_behind_the_last_token(model, calls, allowance) -> None:
    (answer,) = model.answer_requests(
        [request(model)], Settings(max_new_tokens=allowance), batch_size=1
    )
    assert answer.tokens == allowance and answer.finish == "length"
    assert sum(row[0] for row in calls) == allowance - 1


def test_a_stream_gives_its_first_piece_before_a_second_token_is_there(model, calls) -> None:
    pieces = model.stream(QUESTION, images=tiny_model.picture(1), max_new_tokens=6)
    first = next(pieces)
    # A call may be under way; what it gives is not waited for.
    assert first and len(calls) <= 1
    whole = model.generate(QUESTION, images=tiny_model.picture(1), max_new_tokens=6)
    assert first + "".join(pieces) == whole


@pytest.mark.parametrize("how", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_session_gives_its_first_piece_before_a_second_token(model, calls, how) -> None:
    session = Session(model, Settings(max_new_tokens=6, **how))
    session.show_image(tiny_model.picture(1))
    pieces = session.ask(QUESTION)
    first = next(pieces)
    # A call may be under way; what it gives is not waited for.
    assert first and len(calls) <= 1
    rest = "".join(pieces)
    assert sum(row[0] for row in calls) == 5
    # What stands in the slot is what has been computed: the last token has not.
    (lane,) = session._engine._lanes.lanes  # type: ignore
    assert len(lane.slots[0].marks) == int(lane.state.used_B[0])
    whole = model.generate(QUESTION, images=tiny_model.picture(1), max_new_tokens=6, **how)
    assert first + rest == whole


def test_an_answer_that_ends_at_once_has_no_token_decoded(model, calls) -> None:
    first = one_by_one(model, 1)
    ended = Model(model.params, model.bundle, model.tokenizer, model.buckets)
    ended.__dict__["stop_ids"] = (first[0],)
    (answer,) = ended.answer_requests([request(ended)], Settings(max_new_tokens=6), batch_size=1)
    assert (answer.text, answer.tokens, answer.finish) == ("", 0, "stop")
    assert sum(sum(rows) for rows in calls) == 0
