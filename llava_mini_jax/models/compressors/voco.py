"""VoCo-LLaMA: an image is what its last tokens remember of it (arXiv 2406.12275).

    [ patches | between | VoCo x count ] text     one sequence through the language model;
                            '---- text behind sees these, and of the image nothing else

No module: the mask alone makes the language model compress. So the patches' keys and values may be
dropped once the VoCo tokens have been computed.

    "release"   text behind the last VoCo token sees nothing in front of the first one, the prompt's
                beginning included: the authors put images in front of all other text
    "clean"     it sees all text; an image's patches are seen up to its own last VoCo token

Dimensions: B rows, S positions, I images, P patches, Q tokens of an image, D width of the LLM.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from flax import struct

from llava_mini_jax import sharding
from llava_mini_jax.models import llama
from llava_mini_jax.models.compressors.signature import (
    PROJECTED,
    Compressed,
    CompressorConfig,
    Declaration,
    How,
    Piece,
    Placed,
)
from llava_mini_jax.models.decoder import each
from llava_mini_jax.models.seen import Seen
from llava_mini_jax.ops.attention import attend
from llava_mini_jax.ops.masks import Mask
from llava_mini_jax.params import Array, Leaf, ParamSpec, normal

VARIANTS = ("release", "clean")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VoCoConfig(CompressorConfig):
    kind: str = "voco"
    count: int  # VoCo tokens of an image; 2 in the authors' code, 1 is the paper's main result
    # The token's id in an enlarged vocabulary (32000), whose row is trained with the LLM; None: its
    # embedding is a parameter of the compressor's, `width` wide.
    token_id: int | None
    width: int
    between: tuple[int, ...]  # ids of text between patches and VoCo tokens: a newline, (13,)
    variant: str

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"voco has no {self.count} tokens; give 1 or more")
        if self.variant not in VARIANTS:
            raise ValueError(f'variant "{self.variant}" must be {" or ".join(VARIANTS)}')

    @property
    def behind(self) -> int:
        """Tokens behind an image's patches."""
        return len(self.between) + self.count


Config = VoCoConfig


@struct.dataclass
class VoCo:
    token: Leaf  # [D]


def declare(cfg: VoCoConfig) -> Declaration:
    ids = (*cfg.between, -1 if cfg.token_id is None else cfg.token_id)
    return Declaration(
        places=(PROJECTED,),
        videos=cfg.variant == "clean",
        inside=True,
        keeps=(0, cfg.count),
        vocabulary=max(ids) + 1,
    )


def tokens(cfg: VoCoConfig, side: int) -> int:
    """Positions in front of the language model's first layer: only the last `count` are read."""
    return side * side + cfg.behind


def spec(cfg: VoCoConfig) -> VoCo | None:
    if cfg.token_id is not None:
        return None
    return VoCo(token=ParamSpec((cfg.width,), ("norm",), normal(0.02)))


def apply(params: VoCo | None, seen: Seen, cfg: VoCoConfig) -> Compressed:
    """The patches, and places for what stands behind them: `run` puts it there."""
    return Compressed(jnp.pad(seen.patches_IPE, ((0, 0), (0, cfg.behind), (0, 0))))


def run(
    params: VoCo | None,
    llm: llama.Llama,
    x_BSD: Array,
    placed: Placed,
    cfg: VoCoConfig,
    how: How,
) -> Array:
    B, S, _ = x_BSD.shape
    x_BSD = with_tokens(params, llm, x_BSD, placed, cfg)
    mask = Mask(
        first=0,
        valid_BS=placed.valid_BS,
        window=how.llm.window,
        until_BS=seen_until(placed, cfg),
    )
    positions_BS = jnp.broadcast_to(jnp.arange(S), (B, S))
    attends = attend(mask, how.attention)
    layers = each(llm.layers, how.llm)
    return llama.run_layers(layers, x_BSD, positions_BS, attends, how.llm, remat=how.remat)


def pieces(pictures: Sequence[tuple[int, int]], cfg: VoCoConfig) -> list[Piece]:
    """What is read together of a prompt with images at positions (first, end), their VoCo tokens
    last: what nobody behind a piece sees leaves the cache with it."""
    if cfg.variant == "clean" or not pictures:
        return [Piece(first, end, cfg.count) for first, end in pictures]
    # Whatever stands behind the first VoCo token is seen, later images' patches too.
    first_voco, end = pictures[0][1] - cfg.count, pictures[-1][1]
    return [Piece(0, end, end - first_voco)]


def seen_until(placed: Placed, cfg: VoCoConfig) -> Array:
    """The last position [B, S] whose query may see each position (ops/masks.py: Mask)."""
    S = placed.visual_BS.shape[1]
    here_S = jnp.arange(S)
    patches = placed.patches
    first_BS = here_S - placed.place_BS  # of the image that a token belongs to
    last_BS = first_BS + patches + cfg.behind - 1
    is_voco_BS = placed.visual_BS & (placed.place_BS >= patches + len(cfg.between))
    if cfg.variant == "clean":
        hidden_BS = placed.visual_BS & ~is_voco_BS
        return jnp.where(hidden_BS, last_BS, S)
    # Rows without an image: everything is behind the first VoCo token, so nothing is hidden.
    first_B = jnp.where(is_voco_BS, here_S, S).min(axis=1)
    first_B = jnp.where(first_B == S, 0, first_B)
    end_B = jnp.where(is_voco_BS, here_S, -1).max(axis=1)
    return jnp.where(here_S < first_B[:, None], end_B[:, None], S)


def with_tokens(
    params: VoCo | None, llm: llama.Llama, x_BSD: Array, placed: Placed, cfg: VoCoConfig
) -> Array:
    """The sequence with the embeddings of what stands behind the patches."""
    own = cfg.token_id if cfg.token_id is not None else 0
    ids = jnp.asarray((*cfg.between, *[own] * cfg.count), jnp.int32)
    embedded_KD = llama.embed(llm, ids[None], x_BSD.dtype)[0]
    if params is not None:
        embedded_KD = embedded_KD.at[len(cfg.between) :].set(params.token.astype(x_BSD.dtype))
    behind_BS = placed.place_BS - placed.patches
    there_BS = placed.visual_BS & (behind_BS >= 0)
    # On a mesh each device has its own rows, and JAX wants to be told so.
    rows = sharding.partition(x_BSD.shape, ("batch", None, None))
    found_BSD = embedded_KD.at[jnp.clip(behind_BS, 0, cfg.behind - 1)].get(out_sharding=rows)
    return jnp.where(there_BS[..., None], found_BSD, x_BSD)
