"""The digits world in which `llava-mini reproduce` retrains the rows of the paper's tables.

    captions, questions   once: what a 7B run downloads, a tower that sees and a model that talks
    stage1                for each seed, as in configs/digits.py
    stage2                for each seed and row: the row's model, the same data and steps

It differs from the demo's world in that its language model has four layers, so that four layers of
pre-fusion can start as copies of them. Seeds change the stages that the paper trains.
"""

import dataclasses

from configs import digits
from configs.digits import VISION, Digits
from llava_mini_jax.config import build

LLM = dataclasses.replace(digits.LLM, layers=4)
PATCHES = build(
    LLM, VISION, "paper", compressor="none", prefusion_layers=0, compute_dtype="float32"
)
MINI = build(LLM, VISION, "paper", grid=1, prefusion_layers=4, compute_dtype="float32")


def config() -> Digits:
    demo = digits.config()
    return Digits(
        captions=dataclasses.replace(demo.captions, model=PATCHES),
        baseline=dataclasses.replace(demo.baseline, model=PATCHES),
        stage1=dataclasses.replace(demo.stage1, model=PATCHES),
        # With the demo's 2e-3 a seed of three still has a place on the page that it does not read.
        stage2=dataclasses.replace(
            demo.stage2,
            model=MINI,
            steps=1200,
            optimizer=dataclasses.replace(demo.stage2.optimizer, learning_rate=3e-3),
        ),
    )
