"""The digits world's video model: it finds the one page of a video that differs from the others.

    make demo                                                       stage2: single pages
    python train.py configs/digits_video.py --workdir out/needle    video: clips of pages

Trained on clips of at most 8 pages and asked about up to 1,000 (`eval.py --benchmarks needle`), it
shows how far LLaVA-Mini's way of reading videos goes beyond the lengths of training (paper section
5.2); docs/results/needle.md has the results. `--start DIR` starts from another model,
`--data.frames 32` trains on longer clips.
"""

import dataclasses

from configs import digits
from llava_mini_jax.config import build, prompt_config
from llava_mini_jax.data.digits.pages import DigitsConfig
from llava_mini_jax.ops.rope import RopeConfig
from llava_mini_jax.training.stages import TrainConfig

# Positions have no parameters, so the demo's weights begin a model of more positions and of another
# theta. With the demo's, 1e4, eight of a head's twelve pairs of dimensions turn over 1,000 pages to
# angles that clips of 8 do not have; with 1e12 three do.
LLM = dataclasses.replace(digits.LLM, max_positions=1280, rope=RopeConfig(theta=1e12, scaling=None))
MODEL = build(LLM, digits.VISION, "paper", grid=1, prefusion_layers=2, compute_dtype="float32")
CLIPS = DigitsConfig(
    page_size=digits.PAGE, augment=True, kinds=("needle",), frames=8, fewest_frames=4, seed=3
)


def config() -> TrainConfig:
    return dataclasses.replace(
        digits.config().stage2,
        name="video",
        model=MODEL,
        prompt=prompt_config("paper", "brief", LLM.max_positions),
        data=CLIPS,
        start="out/demo/stage2/model",
        lengths=tuple(range(8, LLM.max_positions + 1, 8)),
        batch_size=32,
        # Short clips are learnt after 300; what follows is what carries over to long videos.
        steps=800,
    )
