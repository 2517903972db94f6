"""TokenPacker at 144 tokens (scale 2), as released; scale 3 gives 64 and scale 4 gives 36."""

from configs import compared
from llava_mini_jax.config import CLIP_L_336, VICUNA_7B
from llava_mini_jax.models.compressors.token_packer import TokenPackerConfig


def config() -> compared.Stages:
    return compared.stages(
        TokenPackerConfig(
            width=CLIP_L_336.width,
            out_width=VICUNA_7B.width,
            heads=8,
            levels=(12, 16, 22, 23),
            scale=2,
            norm_eps=1e-6,
        )
    )
