"""The authors' public training (scripts/llavamini/train.sh) as differences from the paper's runs.

                       paper                          release
    dialect            "paper"                        "release" (config.py)
    stage 1 trains     projector, patches as they are projector, compressor and pre-fusion, 1 token
    new pre-fusion     copied (our choice)            fresh
    stage 2            batch 256, projector at 1e-5   batch 16 (4 GPUs x 4), one rate of 1e-4
    gradient clipping  1 (LLaVA-1.5's)                0.5 in stage 2
    length             2048                           4096 in stage 2
    images             padded to a square             centre crop (the script leaves the default)
    text-only rows     plain text                     fused with a blank image
    videos             one frame a second             8 frames, whatever the length

Not repeated: that its training tokenises a video's mark as words, so that the language model never
sees a video's tokens, and that it replaces samples that fail to load by other ones.
"""

import dataclasses

from llava_mini_jax.config import CLIP_L_336, image_config, prompt_config
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.training.stages import TrainConfig, rebuilt

VIDEO = FrameSampling(count=8, rule="release")
ADAPTER = ("projector/*", "compressor/*", "prefusion/*")


def released(parent: TrainConfig, max_length: int) -> TrainConfig:
    """`parent` in the release's dialect, with its habits of text, images and videos."""
    prompt = prompt_config("release", parent.prompt.template, max_length)
    return dataclasses.replace(
        rebuilt(parent, "release", grid=1, prefusion_layers=4),
        images=dataclasses.replace(image_config("release", CLIP_L_336), aspect="crop"),
        prompt=dataclasses.replace(prompt, blank_image=True),
        data=dataclasses.replace(parent.data, video=VIDEO),
        lengths=tuple(sorted({*parent.lengths, max_length})),
        prefusion_init="fresh",
    )
