"""LLaMA-VID with two tokens of a picture: one by its question, one the mean of all patches.

Questions are read in BERT's vocabulary: models/bert-base-uncased, beside the language model. Its
authors begin with InstructBLIP's Q-Former and keep it frozen in stage 1; no folder has it alone, so
here it is new, BERT's size, and learns with its projections. With CLIP's tower, not their EVA.
"""

from configs import compared
from llava_mini_jax.config import CLIP_L_336, VICUNA_7B
from llava_mini_jax.models.compressors.llama_vid import LlamaVidConfig


def config() -> compared.Stages:
    return compared.stages(
        LlamaVidConfig(
            width=CLIP_L_336.width,
            out_width=VICUNA_7B.width,
            content=1,
            class_token=False,
            vision_norm_eps=1e-5,
            qformer_width=768,
            qformer_heads=12,
            qformer_layers=12,
            qformer_mlp_width=3072,
            qformer_cross_every=2,
            qformer_cross_width=CLIP_L_336.width,
            qformer_queries=32,
            qformer_vocabulary=30523,
            qformer_positions=512,
            qformer_norm_eps=1e-12,
        )
    )
