"""LLaMA-VID with two tokens of an image: one by its question, one the mean of all patches.

Questions are read in BERT's vocabulary: models/bert-base-uncased, beside the language model. The
authors start from InstructBLIP's Q-Former and freeze it in stage 1. No folder has it alone, so here
it starts from scratch, in its size, and learns in both stages. The tower is CLIP's, not their EVA.
"""

from configs import compared
from llava_mini_jax.config import CLIP_L_336, VICUNA_7B
from llava_mini_jax.models.compressors.llama_vid import INSTRUCT_BLIP, LlamaVidConfig


def config() -> compared.Stages:
    return compared.stages(
        LlamaVidConfig(
            width=CLIP_L_336.width,
            out_width=VICUNA_7B.width,
            content=1,
            class_token=False,
            vision_norm_eps=1e-5,
            **INSTRUCT_BLIP,
        )
    )
