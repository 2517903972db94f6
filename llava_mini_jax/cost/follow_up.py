"""Time to the first token of a first question, and of the next one about the same picture.

    a picture, a question --Session--> first token        an answer          the next question's
    |------------- first -----------|                 (not counted)       |------ follow-up ------|

The clock starts before the picture is read. What the next question need not compute again is what
inference/session.py keeps: the picture's keys and values, and the cache of the conversation.
"""

import time

import numpy as np

from llava_mini_jax import config as configs
from llava_mini_jax.cost.latency import Candidate, Request, Runner
from llava_mini_jax.data.digits.pages import build_tokenizer
from llava_mini_jax.inference import bounds
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.model import Model
from llava_mini_jax.inference.session import Session

QUESTIONS = ("which digit is the largest?", "which row is it in?")


def askable(model: Candidate) -> Model:
    """A model without a folder, with the digits world's tokenizer: most of its ids say nothing."""
    tokenizer = build_tokenizer()
    bundle = configs.Bundle(
        model=model.cfg,
        images=configs.image_config("release", model.cfg.vision),
        prompt=configs.prompt_config("release", "vicuna_v1", model.cfg.llm.max_positions),
        eos_ids=(),
        pad_id=0,
    )
    return Model(model.params, bundle, tokenizer, bounds.buckets_for(bundle))


def runner(model: Model, request: Request) -> Runner:
    """Asks both questions when it is called; milliseconds to the first token of each."""
    side = model.bundle.model.vision.image_size
    picture = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    one, all_of_it = (Settings(max_new_tokens=n) for n in (1, request.new_tokens))

    def run() -> tuple[float, float]:
        session = Session(model, one)
        began = time.perf_counter()
        session.show_image(picture)
        session.answer_alone(QUESTIONS[0])
        first = time.perf_counter()
        session.settings = all_of_it
        session.answer_alone(QUESTIONS[0])
        session.settings = one
        again = time.perf_counter()
        for _ in session.ask(QUESTIONS[1]):
            pass
        return 1e3 * (first - began), 1e3 * (time.perf_counter() - again)

    return run
