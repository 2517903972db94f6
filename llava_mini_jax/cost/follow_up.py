"""Time to the first token of a first question, and of the next one about the same image.

    an image, a question --Session--> first token         an answer          the next question's
    |------------- first -----------|                 (not counted)       |------ follow-up ------|

The clock starts before the image is read. What the next question need not compute again is what
inference/session.py keeps: the image's keys and values, and the cache of the conversation.
"""

import time

import numpy as np

from llava_mini_jax.cost.latency import Request, Runner
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.model import Model
from llava_mini_jax.inference.session import Session

QUESTIONS = ("which digit is the largest?", "which row is it in?")


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
