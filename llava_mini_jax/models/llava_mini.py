"""LLaVA-Mini: image, high-resolution image and video in front of a LLaMA, with C*C tokens an image.

    pixels_BIJYXC --vision--> features --projector--> patches_ISD ------.
                                 |                                      |
                                 '--compressor--> compressed_IQD -------|  (paper: behind projector,
    ids_BT ------embed--> text_BTD -------------------------------------|   release: before)
                                                                        v
                  prefusion over [ patches | compressed | text ], per image or frame
                        |                                 |
                  compressed tokens              fused text, mean over the row's images
                        '---------------splice------------'
                                          |
                                   inputs_BSD --llm--> logits_BSV

Dimensions: B rows, I images or frames of a row, J parts of an image (k*k sub-images row-major, the
whole picture last; 1 without high resolution), Y X C pixels, P patches of a part, S image positions
in pre-fusion or LLM positions, Q compressed tokens of an image, T text, D language width.

LLaVA-1.5 and the paper's ablations are configurations of the same code: compressor "none" and no
pre-fusion layers is LLaVA-1.5.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from llava_mini_jax.models import clip, compressor, inner_compression, llama, prefusion, projector
from llava_mini_jax.models.splice import splice
from llava_mini_jax.ops.layers import check_remat
from llava_mini_jax.params import Array, Leaf, unstack

FRAMES_TOGETHER = 8  # of a row, where a backward pass computes them again


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaMiniConfig:
    vision: clip.ClipConfig
    projector: projector.ProjectorConfig
    compressor: compressor.CompressorConfig
    compress: str  # "projected" patches (paper) or raw vision "features" (release)
    prefusion_layers: int  # 0: none
    fuse_compressed: (
        bool  # compressed tokens pass through pre-fusion (release) or around it (paper)
    )
    detach_text: bool  # no gradient from the inputs into the embedding table (release)
    inside_layers: int  # > 0: compression after that many LLM layers (paper E.3), no pre-fusion
    llm: llama.LlamaConfig
    compute_dtype: str
    remat: str  # what of each layer is kept for the backward pass (ops/layers.py)

    def __post_init__(self):
        check_remat(self.remat)
        if self.compress not in ("projected", "features"):
            raise ValueError(f'compress "{self.compress}" must be "projected" or "features"')
        if self.prefusion_layers < 0:
            raise ValueError(f"{self.prefusion_layers} pre-fusion layers; give 0 (none) or more")
        if self.inside_layers and (self.prefusion_layers or self.compressor.kind == "none"):
            raise ValueError(
                "compression inside the LLM needs a compressor and no pre-fusion layers"
            )
        if not 0 <= self.inside_layers < self.llm.layers:
            raise ValueError(f"inside_layers {self.inside_layers} of {self.llm.layers} LLM layers")

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute_dtype)

    def tokens_per_image(self, parts: int) -> int:
        """Q: visual tokens that an image of J parts gives the language model."""
        if self.compressor.kind == "none":
            return self.patches_per_image(parts)
        return self.compressor.grid**2

    def patches_per_image(self, parts: int) -> int:
        return self.vision.grid**2 * parts

    def detail_per_image(self, parts: int) -> int:
        """Patches of an image that are compressed: not those of the whole beside its parts."""
        return self.patches_per_image(max(parts - 1, 1))

    def positions_per_image(self, parts: int) -> int:
        """Visual tokens of an image in front of the language model's first layer."""
        inside = self.inside_layers > 0
        return self.patches_per_image(parts) if inside else self.tokens_per_image(parts)


@struct.dataclass
class LlavaMini:
    vision: clip.Clip
    projector: projector.Projector
    compressor: compressor.Compressor
    prefusion: prefusion.Prefusion | None
    llm: llama.Llama


@struct.dataclass
class Inputs:
    """A batch as the host plans it; every shape is one of a few declared buckets."""

    ids_BT: Leaf  # int32 token ids, negative at image marks, anything where padded
    fuse_BT: Leaf  # bool: takes part in pre-fusion (not marks, padding, answers)
    pixels_BIJYXC: Leaf  # uint8, or floating-point already normalised; I may be 0
    frames_BI: Leaf  # bool: a real image or frame, not padding
    slots_BS: Leaf  # int32: what stands where in the language model's sequence (models/splice.py)
    wide_slots_BU: Leaf = None  # the same with all patches, for compression inside the LLM


def spec(cfg: LlavaMiniConfig) -> LlavaMini:
    return LlavaMini(
        vision=clip.spec(cfg.vision),
        projector=projector.spec(cfg.projector),
        compressor=compressor.spec(cfg.compressor),
        prefusion=prefusion.spec(cfg.prefusion_layers, cfg.llm),
        llm=llama.spec(cfg.llm),
    )


def apply(params: LlavaMini, inputs: Inputs, cfg: LlavaMiniConfig) -> Array:
    """Hidden states [B, S, D] of the language model, after its final norm."""
    x_BSD, llm = embed_inputs(params, inputs, cfg), params.llm
    if cfg.inside_layers:
        first, llm = inner_compression.split_llm(params.llm, cfg.inside_layers)
        x_BSD = llama.run_whole(
            first.layers, x_BSD, inputs.wide_slots_BU >= 0, cfg.llm, remat=cfg.remat
        )
        I, J = inputs.pixels_BIJYXC.shape[1:3]
        sizes = (inputs.ids_BT.shape[1], I, cfg.patches_per_image(J), cfg.detail_per_image(J))
        x_BSD = inner_compression.squeeze(
            params.compressor, x_BSD, inputs.wide_slots_BU, inputs.slots_BS, sizes, cfg.compressor
        )
    return llama.apply(llm, x_BSD, inputs.slots_BS >= 0, cfg.llm, remat=cfg.remat)


def embed_inputs(params: LlavaMini, inputs: Inputs, cfg: LlavaMiniConfig) -> Array:
    """What the language model reads [B, S, D]: fused text and visual tokens in their places."""
    slots_BS = inputs.wide_slots_BU if cfg.inside_layers else inputs.slots_BS
    text_BTD = embed_text(params, inputs.ids_BT, cfg)
    B, I = inputs.pixels_BIJYXC.shape[:2]
    if I == 0:
        # Text alone is not fused, unless `blank_image` has given it a picture.
        return splice(text_BTD, text_BTD[:, :0], slots_BS)
    total_BTD, tokens_BIQD = _encode_rows(params, inputs, text_BTD, cfg)
    fused_BTD = finish_mean(total_BTD, inputs.frames_BI.sum(axis=1), text_BTD)
    return splice(fused_BTD, tokens_BIQD.reshape(B, -1, text_BTD.shape[-1]), slots_BS)


def _encode_rows(
    params: LlavaMini, inputs: Inputs, text_BTD: Array, cfg: LlavaMiniConfig
) -> tuple[Array, Array]:
    """(float32 sum of the fused text over each row's frames, visual tokens [B, I, Q, D]).

    Where layers are recomputed, long videos are too, a few frames after the other: each frame is
    fused with the whole text, so all at once would take gigabytes a row.
    """

    def encode_some(pixels_BIJYXC: Array, frames_BI: Array) -> tuple[Array, Array]:
        B, I, *part_shape = pixels_BIJYXC.shape

        def per_image(x: Array) -> Array:
            """Each row's entry once for each of its images: [B, ...] -> [B*I, ...]."""
            # `jnp.repeat` wants to be told its sharding on a mesh; this keeps the rows'.
            repeated = jnp.broadcast_to(x[:, None], (B, I, *x.shape[1:]))
            return repeated.reshape(B * I, *x.shape[1:])

        pixels_IJYXC = pixels_BIJYXC.reshape(B * I, *part_shape)
        tokens_IQD, fused_ITD = encode_images(
            params, pixels_IJYXC, per_image(text_BTD), per_image(inputs.fuse_BT), cfg
        )
        # Summed in float32, as in the release: a long sum in bfloat16 swallows single frames.
        fused_BITD = fused_ITD.astype(jnp.float32).reshape(B, I, *fused_ITD.shape[1:])
        # Paper section 4.2 pools over the frames of a video; several images do the same.
        total_BTD = jnp.where(frames_BI[:, :, None, None], fused_BITD, 0.0).sum(axis=1)
        return total_BTD, tokens_IQD.reshape(B, I, *tokens_IQD.shape[1:])

    B, I = inputs.frames_BI.shape
    if cfg.remat == "none" or I <= FRAMES_TOGETHER:
        return encode_some(inputs.pixels_BIJYXC, inputs.frames_BI)

    def chunks(x: Array) -> Array:
        """[B, I, ...] -> [chunks, B, FRAMES_TOGETHER, ...]."""
        missing = -I % FRAMES_TOGETHER
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, FRAMES_TOGETHER, *x.shape[2:]), 1, 0)

    def add(total_BTD: Array, some: tuple[Array, Array]) -> tuple[Array, Array]:
        more_BTD, tokens_BIQD = encode_some(*some)
        return total_BTD + more_BTD, tokens_BIQD

    given = chunks(inputs.pixels_BIJYXC), chunks(inputs.frames_BI)
    # Inside a loop nothing can undo the recomputation, so its costly prevention is not needed.
    add = jax.checkpoint(add, prevent_cse=False)
    zeros_BTD = jnp.zeros_like(text_BTD, jnp.float32)
    total_BTD, tokens = jax.lax.scan(add, zeros_BTD, given)
    tokens_BIQD = jnp.moveaxis(tokens, 0, 1).reshape(B, -1, *tokens.shape[3:])
    return total_BTD, tokens_BIQD[:, :I]


def embed_text(params: LlavaMini, ids_BT: Array, cfg: LlavaMiniConfig) -> Array:
    text_BTD = llama.embed(params.llm, ids_BT, cfg.dtype)
    return jax.lax.stop_gradient(text_BTD) if cfg.detach_text else text_BTD


def encode_images(
    params: LlavaMini, pixels_IJYXC: Array, text_ITD: Array, fuse_IT: Array, cfg: LlavaMiniConfig
) -> tuple[Array, Array]:
    """(visual tokens [I, Q, D], fused text [I, T, D]) of images, each with its own text."""
    patches_ISD, compressed_IQD = encode_and_compress(params, pixels_IJYXC, cfg)
    if params.prefusion is None:
        return compressed_IQD, text_ITD
    tokens_IQD, memory = prefuse_images(params, patches_ISD, compressed_IQD, cfg)
    fused_ITD = prefusion.prefuse_text(
        params.prefusion, memory, text_ITD, fuse_IT, cfg.llm, remat=cfg.remat
    )
    return tokens_IQD, fused_ITD


def encode_and_compress(
    params: LlavaMini, pixels_IJYXC: Array, cfg: LlavaMiniConfig
) -> tuple[Array, Array]:
    """(patches [I, S, D], compressed [I, Q, D]) of images in the language model's width."""
    return project_and_compress(params, encode_vision(params, pixels_IJYXC, cfg), cfg)


def encode_vision(params: LlavaMini, pixels_IJYXC: Array, cfg: LlavaMiniConfig) -> Array:
    """The tower's features [I, J, P, E] of images of J parts."""
    I, J = pixels_IJYXC.shape[:2]
    features_RPE = clip.apply(
        params.vision, pixels_IJYXC.reshape(I * J, *pixels_IJYXC.shape[2:]), cfg.vision, cfg.dtype
    )
    return features_RPE.reshape(I, J, *features_RPE.shape[1:])


def project_and_compress(
    params: LlavaMini, features_IJPE: Array, cfg: LlavaMiniConfig
) -> tuple[Array, Array]:
    """`encode_and_compress` from the tower's features on.

    High resolution (J = k*k + 1): the sub-images' patches are one map of k times the side, which
    alone is compressed; in pre-fusion the whole picture's patches follow it (paper section 4.2).
    """
    I, J, P, E = features_IJPE.shape
    detail, whole = detail_and_whole(features_IJPE.reshape(I * J, P, E), I, J)
    detail_ISD = projector.apply(params.projector, detail)
    if cfg.inside_layers:
        compressed_IQD = detail_ISD  # left as they are until the language model's layer is reached
    elif cfg.compressor.kind == "none" or cfg.compress == "projected":
        compressed_IQD, _ = compressor.apply(params.compressor, detail_ISD, cfg.compressor)
    else:
        tokens_IQE, _ = compressor.apply(params.compressor, detail, cfg.compressor)
        compressed_IQD = projector.apply(params.projector, tokens_IQE)
    patches_ISD = detail_ISD
    if whole is not None:
        whole_IPD = projector.apply(params.projector, whole)
        patches_ISD = jnp.concatenate([detail_ISD, whole_IPD], axis=1)
    # Where nothing is compressed the whole picture's patches are tokens, too: LLaVA-1.5 at
    # 672 pixels has 5 x 576.
    uncompressed = cfg.compressor.kind == "none" or cfg.inside_layers
    return patches_ISD, patches_ISD if uncompressed else compressed_IQD


def prefuse_images(
    params: LlavaMini, patches_ISD: Array, compressed_IQD: Array, cfg: LlavaMiniConfig
) -> tuple[Array, prefusion.ImageMemory]:
    """(visual tokens for the language model, pre-fusion memory) of images: no text involved."""
    assert params.prefusion is not None
    if not cfg.fuse_compressed:
        # 0 outputs: nobody reads the patches', and compressed tokens go around pre-fusion.
        _, memory = prefusion.prefuse_image(
            params.prefusion, patches_ISD, 0, cfg.llm, remat=cfg.remat
        )
        return compressed_IQD, memory
    if cfg.compressor.kind != "none":  # with "none" the tokens are the patches themselves
        patches_ISD = jnp.concatenate([patches_ISD, compressed_IQD], axis=1)
    return prefusion.prefuse_image(
        params.prefusion, patches_ISD, compressed_IQD.shape[1], cfg.llm, remat=cfg.remat
    )


def finish_mean(total_BTD: Array, count_B: Array, text_BTD: Array) -> Array:
    """Sums of fused text over `count_B` images as their mean; the text itself where that is 0."""
    # Not 0 / 0, whose gradient is NaN even where `where` takes the other branch.
    mean_BTD = total_BTD / jnp.maximum(count_B, 1)[:, None, None]
    return jnp.where((count_B > 0)[:, None, None], mean_BTD.astype(text_BTD.dtype), text_BTD)


def detail_and_whole(features_RPE: Array, I: int, J: int) -> tuple[Array, Array | None]:
    """What is compressed, [I, k*k*P, E] as one row-major map, and the whole picture [I, P, E]."""
    if J == 1:
        return features_RPE, None
    P, E = features_RPE.shape[1:]
    k, side = round((J - 1) ** 0.5), round(P**0.5)
    if k * k + 1 != J:
        raise ValueError(f"{J} parts are not k*k sub-images and a whole picture")
    parts = features_RPE.reshape(I, J, P, E)
    # [I, (row, column) of the sub-image, (y, x) of the patch, E] -> rows of the whole map.
    rows = parts[:, :-1].reshape(I, k, k, P, E).reshape(I, k, k, side, side, E)
    rows = rows.transpose(0, 1, 3, 2, 4, 5)
    return rows.reshape(I, k * side * k * side, E), parts[:, -1]


def unrolled(tree: LlavaMini) -> LlavaMini:
    """Parameters or specs with every stack as a tuple of layers (see ops/layers.py)."""

    def unroll(part: Any) -> Any:
        return part and dataclasses.replace(part, layers=unstack(part.layers))

    return dataclasses.replace(
        tree,
        vision=unroll(tree.vision),
        prefusion=unroll(tree.prefusion),
        llm=unroll(tree.llm),
    )
