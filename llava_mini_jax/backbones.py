"""Published language models and towers, by name: the sizes that their config.json files say.

    BACKBONES["qwen2.5-3b"], tower_of("qwen2.5-3b") --config.build--> LlavaMiniConfig

What a model of a folder is comes from its own config.json (weights/); these are for configs of
training, and for what is planned and profiled before there is a folder.
"""

import dataclasses

from llava_mini_jax.data.media.images import CLIP_MEAN, CLIP_STD
from llava_mini_jax.errors import InputError
from llava_mini_jax.models.clip import ClipConfig
from llava_mini_jax.models.llama import LlamaConfig
from llava_mini_jax.ops.rope import Llama3Scaling, RopeConfig

SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)

CLIP_L_336 = ClipConfig(
    image_size=336,
    patch_size=14,
    width=1024,
    mlp_width=4096,
    layers=24,
    heads=16,
    norm_eps=1e-5,
    activation="quick_gelu",
    class_token=True,
    pre_norm=True,
    patch_bias=False,
    select_layer=-2,
    select_feature="patch",
    resample="bicubic",
    mean=CLIP_MEAN,
    std=CLIP_STD,
)

# SigLIP 2 of a fixed resolution, patches of 16 pixels: 256 of them, and 576 as CLIP-L/336 has.
SIGLIP2_BASE_256 = ClipConfig(
    image_size=256,
    patch_size=16,
    width=768,
    mlp_width=3072,
    layers=12,
    heads=12,
    norm_eps=1e-6,
    activation="gelu_pytorch_tanh",
    class_token=False,
    pre_norm=False,
    patch_bias=True,
    select_layer=-2,
    select_feature="patch",
    resample="bilinear",
    mean=SIGLIP_MEAN,
    std=SIGLIP_STD,
)

SIGLIP2_SO400M_384 = dataclasses.replace(
    SIGLIP2_BASE_256, image_size=384, width=1152, mlp_width=4304, layers=27, heads=16
)

VICUNA_7B = LlamaConfig(
    vocab_size=32000,
    width=4096,
    mlp_width=11008,
    layers=32,
    heads=32,
    kv_heads=32,
    head_width=128,
    norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0, scaling=None),
    max_positions=4096,
    tied_head=False,
    qkv_bias=False,
    qk_norm=False,
    window=None,
    nope_layers=(),
    init_stddev=0.02,
)

VICUNA_13B = dataclasses.replace(
    VICUNA_7B, width=5120, mlp_width=13824, layers=40, heads=40, kv_heads=40
)

LLAMA_3_1_8B = LlamaConfig(
    vocab_size=128256,
    width=4096,
    mlp_width=14336,
    layers=32,
    heads=32,
    kv_heads=8,
    head_width=128,
    norm_eps=1e-5,
    rope=RopeConfig(
        theta=500000.0,
        scaling=Llama3Scaling(
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    ),
    max_positions=131072,
    tied_head=False,
    qkv_bias=False,
    qk_norm=False,
    window=None,
    nope_layers=(),
    init_stddev=0.02,
)

# TinyLlama: small enough to be timed on a CPU.
LLAMA_1_1B = dataclasses.replace(
    VICUNA_7B, width=2048, mlp_width=5632, layers=22, kv_heads=4, head_width=64
)

SMOLLM2_135M = LlamaConfig(
    vocab_size=49152,
    width=576,
    mlp_width=1536,
    layers=30,
    heads=9,
    kv_heads=3,
    head_width=64,
    norm_eps=1e-5,
    rope=RopeConfig(theta=100000.0, scaling=None),
    max_positions=8192,
    tied_head=True,
    qkv_bias=False,
    qk_norm=False,
    window=None,
    nope_layers=(),
    init_stddev=0.041666666666666664,
)

SMOLLM2_360M = dataclasses.replace(
    SMOLLM2_135M, width=960, mlp_width=2560, layers=32, heads=15, kv_heads=5, init_stddev=0.02
)

SMOLLM2_1_7B = dataclasses.replace(
    SMOLLM2_135M,
    width=2048,
    mlp_width=8192,
    layers=24,
    heads=32,
    kv_heads=32,
    rope=RopeConfig(theta=130000.0, scaling=None),
    init_stddev=0.02,
)

QWEN2_5_0_5B = LlamaConfig(
    vocab_size=151936,
    width=896,
    mlp_width=4864,
    layers=24,
    heads=14,
    kv_heads=2,
    head_width=64,
    norm_eps=1e-6,
    rope=RopeConfig(theta=1000000.0, scaling=None),
    max_positions=32768,
    tied_head=True,
    qkv_bias=True,
    qk_norm=False,
    window=None,
    nope_layers=(),
    init_stddev=0.02,
)

QWEN2_5_3B = dataclasses.replace(
    QWEN2_5_0_5B, width=2048, mlp_width=11008, layers=36, heads=16, head_width=128
)

QWEN2_5_7B = dataclasses.replace(
    QWEN2_5_3B,
    vocab_size=152064,
    width=3584,
    mlp_width=18944,
    layers=28,
    heads=28,
    kv_heads=4,
    tied_head=False,
)

QWEN3_4B = dataclasses.replace(
    QWEN2_5_3B,
    width=2560,
    mlp_width=9728,
    heads=32,
    kv_heads=8,
    max_positions=40960,
    qkv_bias=False,
    qk_norm=True,
)

# Published language models, by the name that commands take.
BACKBONES = {
    "vicuna-7b": VICUNA_7B,
    "vicuna-13b": VICUNA_13B,
    "llama-3.1-8b": LLAMA_3_1_8B,
    "llama-1.1b": LLAMA_1_1B,
    "smollm2-135m": SMOLLM2_135M,
    "smollm2-360m": SMOLLM2_360M,
    "smollm2-1.7b": SMOLLM2_1_7B,
    "qwen2.5-0.5b": QWEN2_5_0_5B,
    "qwen2.5-3b": QWEN2_5_3B,
    "qwen2.5-7b": QWEN2_5_7B,
    "qwen3-4b": QWEN3_4B,
}
# The towers that they stand behind in configs/; the paper's is CLIP-L/336.
TOWERS: dict[str, ClipConfig] = {
    "smollm2-135m": SIGLIP2_BASE_256,
    "smollm2-360m": SIGLIP2_BASE_256,
    "smollm2-1.7b": SIGLIP2_SO400M_384,
    "qwen2.5-0.5b": SIGLIP2_BASE_256,
    "qwen2.5-3b": SIGLIP2_SO400M_384,
    "qwen2.5-7b": SIGLIP2_SO400M_384,
    "qwen3-4b": SIGLIP2_SO400M_384,
}


def backbone(name: str) -> LlamaConfig:
    """A published language model; InputError for a name that is unknown."""
    if name not in BACKBONES:
        raise InputError(f'backbone "{name}" is unknown; use one of {", ".join(BACKBONES)}')
    return BACKBONES[name]


def tower_of(name: str) -> ClipConfig:
    """The tower that goes with a language model of BACKBONES."""
    return TOWERS.get(name, CLIP_L_336)
