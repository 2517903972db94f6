"""What each layer's cache holds of an image, where a compressor's images leave it.

    Declaration.keeps: (K, n)      layers before K   all of its tokens
                                   layers from K on  n of them

With K = 0 (VoCo) all layers are alike, and so are their caches. Behind a choice (FastV, K > 0)
those of later layers are shorter than the first ones'. None: all tokens stay.
"""

from llava_mini_jax.models.llava_mini import LlavaMiniConfig


def chooses(cfg: LlavaMiniConfig) -> bool:
    """Whether later layers keep a choice of an image's tokens."""
    return cfg.declared.keeps is not None and cfg.declared.keeps[0] > 0


def kept(cfg: LlavaMiniConfig) -> list[int]:
    """Of an image's tokens, those that each layer keeps."""
    tokens, layers = cfg.positions_per_image(1), cfg.llm.layers
    first, left = cfg.declared.keeps or (0, tokens)
    return [tokens if number < first else left for number in range(layers)]


def spare(cfg: LlavaMiniConfig) -> int:
    """Places that later layers' caches have less than the first ones', where they choose."""
    tokens = kept(cfg)
    return tokens[0] - tokens[-1]


def lengths(cfg: LlavaMiniConfig, length: int) -> list[int]:
    """Places in each layer's cache of a slot of `length`."""
    tokens = kept(cfg)
    return [max(1, length - (tokens[0] - stays)) for stays in tokens]
