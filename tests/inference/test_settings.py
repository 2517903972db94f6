"""Settings that only the engine knows: taken by it, refused by name where they would be ignored."""

import pytest

import llava_mini_jax
from llava_mini_jax import InputError, Session, Settings
from llava_mini_jax.inference import recompute
from tests import tiny_model

OF_THE_ENGINE = [{"stop_ids": [3]}, {"min_tokens": 2}, {"ignore_end": True}, {"logprobs": 0}]


@pytest.mark.parametrize("given", OF_THE_ENGINE, ids=lambda given: next(iter(given)))
def test_what_would_be_ignored_is_refused(given: dict) -> None:
    model = llava_mini_jax.load(tiny_model.folder("paper"))
    (name,) = given
    with pytest.raises(InputError, match=f"{name} is .*; a session does not support it"):
        Session(model, Settings(**given))
    example = model.request("a", model.read_pictures(None, None))
    answering = recompute.answering(model, [example], [Settings(**given)], 1, lambda *_: None)
    with pytest.raises(InputError, match=f"{name} is .*; a model that answers without a cache"):
        next(answering)
    assert len(model.answer_requests([example], Settings(max_new_tokens=4, **given), batch_size=1))
    Session(model, Settings(max_new_tokens=4))


@pytest.mark.parametrize(
    "given", [{"stop_ids": [-1]}, {"stop_ids": ["a"]}, {"logprobs": 21}, {"logprobs": -1}]
)
def test_values_that_mean_nothing(given: dict) -> None:
    with pytest.raises(InputError, match=f"{next(iter(given))} is "):
        Settings(**given)
