"""VoCo-LLaMA with two tokens, its authors' number; the paper's main result is one.

Their mask hides the prompt's beginning from later text too, because they put images in front of
it; in LLaVA's prompts that would be the question ("clean"). The token is a parameter of the
compressor's own: no vocabulary has to grow. They train two epochs.
"""

from configs import compared
from configs.stage2_llava_1_5_7b import config as llava
from llava_mini_jax.models.compressors.voco import VoCoConfig
from llava_mini_jax.training.stages import TrainConfig

NEWLINE = 13  # LLaMA's id of it


def config() -> TrainConfig:
    width = llava().model.llm.width
    return compared.stage_2(
        VoCoConfig(count=2, token_id=None, width=width, between=(NEWLINE,), variant="clean")
    )
