"""Vision transformers, CLIP's and SigLIP's: images to patch features, never trained.

    pixels_IYXC --patch_embed--> [class | patches] + position --norm--> layers --> patches_IPE
                                                                          '--> more, as declared

SigLIP has no class token and no norm in front of its layers, but a bias behind `patch_embed`; its
pooling head gives one vector of an image, which nobody here reads.

Only the layers that are read are run: with `select_layer` -2 (LLaVA) that is 23 of 24. The others
and the final norm are kept as parameters (`unread_*`) so that an export is complete.

Dimensions: I images, Y X pixel rows and columns, C colours, P patches, S = P, or P + 1 with the
class token, E width, N heads, H = E / N, M MLP width.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from llava_mini_jax.models.seen import PATCHES, Reads, Seen
from llava_mini_jax.ops.attention import attend
from llava_mini_jax.ops.einsum import Linear, einsum, linear
from llava_mini_jax.ops.layers import fold_layers, some_layers
from llava_mini_jax.ops.masks import Mask
from llava_mini_jax.ops.norm import LayerNorm, layer_norm, layer_norm_spec
from llava_mini_jax.params import Array, Leaf, ParamSpec, normal, stack, zeros

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig:
    image_size: int  # pixels
    patch_size: int  # pixels
    width: int
    mlp_width: int
    layers: int
    heads: int
    norm_eps: float
    activation: str  # "quick_gelu" (OpenAI's weights), "gelu" or "gelu_pytorch_tanh" (SigLIP)
    class_token: bool  # CLIP has one
    pre_norm: bool  # a norm before the first block, as in CLIP
    patch_bias: bool  # a bias of the patch embedding, as in SigLIP
    # As in Hugging Face's hidden_states: -1 is the last block's output, -2 the one before.
    select_layer: int
    select_feature: str  # "patch", the only choice: all but the class token
    resample: str  # filter for resizing its images: "bicubic" or "bilinear"
    mean: tuple[float, float, float]  # of the pixels, which are normalised with it and std
    std: tuple[float, float, float]

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f'activation "{self.activation}" is unknown; use one of {known}')
        if not 0 <= self.used_layers <= self.layers:
            raise ValueError(f"select_layer {self.select_layer} of a tower of {self.layers} layers")
        if self.select_feature != "patch":
            raise ValueError(
                f'vision feature "{self.select_feature}"; expected "patch" (llava-hf: "default"):'
                " with the class token the patches do not form a square grid"
            )

    @property
    def grid(self) -> int:
        """Patches along one side. Pixels beyond the last whole patch are left out."""
        return self.image_size // self.patch_size

    @property
    def positions(self) -> int:
        """S, of the patches and, where there is one, the class token."""
        return self.grid**2 + self.class_token

    @property
    def used_layers(self) -> int:
        """How many blocks run before the features are taken."""
        # hidden_states begins with the embeddings: it has one entry more than there are layers.
        return self.select_layer if self.select_layer >= 0 else self.layers + 1 + self.select_layer


@struct.dataclass
class ClipLayer:
    attn_norm: LayerNorm
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    mlp_norm: LayerNorm
    fc1: Linear
    fc2: Linear


@struct.dataclass
class Clip:
    patch_embed: Leaf
    patch_bias: Leaf  # None, as the class token and the norm, where the config says so
    class_token: Leaf
    position: Leaf
    pre_norm: LayerNorm | None
    layers: ClipLayer
    unread_layers: ClipLayer | None  # None where every layer is read
    unread_norm: LayerNorm


def spec(cfg: ClipConfig) -> Clip:
    E, N, M = cfg.width, cfg.heads, cfg.mlp_width
    H = E // N
    init = normal(0.02)
    into_heads = Linear(
        kernel=ParamSpec((N, H, E), ("heads", None, "tower"), init),
        bias=ParamSpec((N, H), ("heads", None), zeros),
    )
    layer = ClipLayer(
        attn_norm=layer_norm_spec(E),
        q_proj=into_heads,
        k_proj=into_heads,
        v_proj=into_heads,
        o_proj=Linear(
            kernel=ParamSpec((E, N, H), ("tower", "heads", None), init),
            bias=ParamSpec((E,), ("norm",), zeros),
        ),
        mlp_norm=layer_norm_spec(E),
        fc1=Linear(
            kernel=ParamSpec((M, E), ("mlp", "tower"), init),
            bias=ParamSpec((M,), ("mlp",), zeros),
        ),
        fc2=Linear(
            kernel=ParamSpec((E, M), ("tower", "mlp"), init),
            bias=ParamSpec((E,), ("norm",), zeros),
        ),
    )
    side, unread = cfg.patch_size, cfg.layers - cfg.used_layers
    return Clip(
        patch_embed=ParamSpec((E, 3, side, side), ("tower", None, None, None), init),
        patch_bias=ParamSpec((E,), ("norm",), zeros) if cfg.patch_bias else None,
        class_token=ParamSpec((E,), ("norm",), normal(E**-0.5)) if cfg.class_token else None,
        position=ParamSpec((cfg.positions, E), (None, "norm"), normal(E**-0.5)),
        pre_norm=layer_norm_spec(E) if cfg.pre_norm else None,
        layers=stack(cfg.used_layers, layer),
        unread_layers=stack(unread, layer) if unread else None,
        unread_norm=layer_norm_spec(E),
    )


def apply(
    params: Clip,
    pixels_IYXC: Array,
    cfg: ClipConfig,
    dtype: jnp.dtype,
    *,
    attention: str = "auto",
) -> Array:
    """Patch features [I, P, E], row-major, in `dtype`.

    uint8 pixels are rescaled and normalised here, on the device: a quarter of the bytes to
    transfer. Floating-point pixels are taken as already normalised.
    """
    return look(params, pixels_IYXC, cfg, dtype, PATCHES, attention=attention).patches_IPE


def look(
    params: Clip,
    pixels_IYXC: Array,
    cfg: ClipConfig,
    dtype: jnp.dtype,
    reads: Reads,
    *,
    attention: str = "auto",
) -> Seen:
    """`apply`, and beside its patches what `reads` declares: nothing else is computed."""
    check_reads(reads, cfg)
    with jax.named_scope("vision"):
        pixels_IYXC = normalize(pixels_IYXC, cfg).astype(dtype)
        x_ISE = _embed(params, pixels_IYXC, cfg)
        # No mask: every position sees every other.
        block = partial(_block, attends=attend(Mask(), attention), cfg=cfg)
        wanted = {*reads.levels} if reads.heads_of is None else {*reads.levels, reads.heads_of}
        kept, at = {}, 0
        # Run from level to level that is read: where none is, that is one loop.
        for level in sorted(wanted | {cfg.used_layers}):
            if level > at:
                x_ISE, _ = fold_layers(block, _some_layers(params.layers, at, level), x_ISE)
            kept[level], at = x_ISE, level
        seen = Seen(
            patches_IPE=x_ISE[:, cfg.class_token :],
            class_IE=x_ISE[:, 0] if reads.class_token else None,
            levels=tuple(kept[level][:, cfg.class_token :] for level in reads.levels),
        )
        if reads.heads_of is None:
            return seen
        layer = layer_of(params, reads.heads_of, cfg)
        query_INH, keys_ISNH = heads_of(layer, kept[reads.heads_of], cfg)
        return dataclasses.replace(seen, query_INH=query_INH, keys_ISNH=keys_ISNH)


def check_reads(reads: Reads, cfg: ClipConfig) -> None:
    """ValueError for what the tower does not have."""
    if not cfg.class_token and (reads.class_token or reads.heads_of is not None):
        raise ValueError(
            "the class token is needed, but this tower has none, like SigLIP: use CLIP's, or a"
            " method that reads patches only"
        )
    levels = reads.levels if reads.heads_of is None else (*reads.levels, reads.heads_of)
    for level in levels:
        if not 0 <= level <= cfg.used_layers:
            raise ValueError(
                f"level {level} is read of a tower of {cfg.layers} layers that runs up to level"
                f" {cfg.used_layers}: give one from 0 to that"
            )
    if reads.heads_of is not None and reads.heads_of >= cfg.layers:
        raise ValueError(
            f"attention of layer {reads.heads_of} is read of a tower whose last one is"
            f" {cfg.layers - 1}"
        )


def _some_layers(layers: Any, first: int, last: int) -> Any:
    """Layers first..last - 1 of a stack, or of a tuple; the stack itself if these are all."""
    count = len(layers) if isinstance(layers, tuple) else layers.q_proj.bias.shape[0]
    if (first, last) == (0, count):
        return layers
    return some_layers(layers, first, last)


def layer_of(params: Clip, number: int, cfg: ClipConfig) -> ClipLayer:
    read = number < cfg.used_layers
    layers = params.layers if read else params.unread_layers
    number = number if read else number - cfg.used_layers
    if isinstance(layers, tuple):
        return layers[number]
    return jax.tree.map(lambda a: a[number], layers)


def heads_of(layer: ClipLayer, x_ISE: Array, cfg: ClipConfig) -> tuple[Array, Array]:
    """The class token's query [I, N, H] and all keys [I, S, N, H] of a layer, in float32.

    In full precision: what selects by them jumps where two scores swap.
    """
    with jax.default_matmul_precision("highest"):
        y_ISE = layer_norm(x_ISE.astype(jnp.float32), layer.attn_norm, cfg.norm_eps)
        axes = ("batch", None, "heads", None)
        query = linear("ISE,NHE->ISNH", y_ISE[:, :1], layer.q_proj, axes)
        keys_ISNH = linear("ISE,NHE->ISNH", y_ISE, layer.k_proj, axes)
    return query[:, 0], keys_ISNH


def normalize(pixels: Array, cfg: ClipConfig) -> Array:
    """uint8 pixels as float32 (value / 255 - mean) / std; floating-point ones unchanged."""
    if pixels.dtype != jnp.uint8:
        return pixels
    mean, std = (jnp.asarray(v, jnp.float32) for v in (cfg.mean, cfg.std))
    return (pixels.astype(jnp.float32) / 255.0 - mean) / std


def _embed(params: Clip, pixels_IYXC: Array, cfg: ClipConfig) -> Array:
    images, side, grid = pixels_IYXC.shape[0], cfg.patch_size, cfg.grid
    if grid * side < cfg.image_size:
        pixels_IYXC = pixels_IYXC[:, : grid * side, : grid * side]
    # A convolution whose stride is its kernel is one product over the pixels of each patch. The
    # axes are split one by one: an Explicit mesh allows only such reshapes.
    rows = pixels_IYXC.reshape(images, grid, side, grid * side, 3)
    cells = rows.reshape(images, grid, side, grid, side, 3)
    # The kernel stays as torch's Conv2d stores it, colours before rows and columns.
    patches_IyxE = einsum(
        "IyuxvC,ECuv->IyxE", cells, params.patch_embed, ("batch", None, None, None)
    )
    x_ISE = patches_IyxE.reshape(images, grid * grid, cfg.width)
    if params.patch_bias is not None:
        x_ISE = x_ISE + params.patch_bias.astype(x_ISE.dtype)
    if params.class_token is not None:
        # Made from the patches, it lies on the mesh as they do; plain zeros could not join them.
        class_I1E = jnp.zeros_like(x_ISE[:, :1]) + params.class_token.astype(x_ISE.dtype)
        x_ISE = jnp.concatenate([class_I1E, x_ISE], axis=1)
    x_ISE = x_ISE + params.position.astype(x_ISE.dtype)
    if params.pre_norm is None:
        return x_ISE
    return layer_norm(x_ISE, params.pre_norm, cfg.norm_eps)


def _block(
    layer: ClipLayer, x_ISE: Array, _: None, *, attends: Callable, cfg: ClipConfig
) -> tuple[Array, None]:
    y_ISE = layer_norm(x_ISE, layer.attn_norm, cfg.norm_eps)
    q, k, v = (
        linear("ISE,NHE->ISNH", y_ISE, p, ("batch", None, "heads", None))
        for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    mixed_ISNH = attends(q, k.swapaxes(1, 2), v.swapaxes(1, 2))
    x_ISE = x_ISE + linear("ISNH,ENH->ISE", mixed_ISNH, layer.o_proj, ("batch", None, None))
    y_ISE = layer_norm(x_ISE, layer.mlp_norm, cfg.norm_eps)
    y_ISM = linear("ISE,ME->ISM", y_ISE, layer.fc1, ("batch", None, "mlp"))
    y_ISE = linear(
        "ISM,EM->ISE", ACTIVATIONS[cfg.activation](y_ISM), layer.fc2, ("batch", None, None)
    )
    return x_ISE + y_ISE, None
