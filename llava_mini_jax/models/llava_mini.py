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
in pre-fusion or LLM positions, Q compressed tokens of an image, T text, F text that takes part in
pre-fusion, D language width.

LLaVA-1.5 and the paper's ablations are configurations of the same code: compressor "none" and no
pre-fusion layers is LLaVA-1.5.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from llava_mini_jax import sharding
from llava_mini_jax.models import clip, compressor, inner_compression, llama, prefusion, projector
from llava_mini_jax.models.splice import splice
from llava_mini_jax.ops.attention import check_attention
from llava_mini_jax.ops.layers import check_remat
from llava_mini_jax.params import Array, Leaf, unstack

FRAMES_TOGETHER = 8  # of a device's rows, where a backward pass computes them again


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
    attention: str = "auto"  # which implementation computes it (ops/attention.py)

    def __post_init__(self):
        check_remat(self.remat)
        check_attention(self.attention)
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
    fuse_BF: Leaf  # int32: text that takes part in pre-fusion (no marks, answers); -1: padding
    pixels_BIJYXC: Leaf  # uint8, or floating-point already normalised; I may be 0
    frames_BI: Leaf  # bool: a real image or frame, not padding
    slots_BS: Leaf  # int32: what stands where in the language model's sequence (models/splice.py)
    wide_slots_BU: Leaf = None  # the same with all patches, for compression inside the LLM
    # Where `slots_BS` is padded: "right" or "left"; None: not known. On the right no valid position
    # sees padding, causal as attention is, and kernels need not be told of it.
    padding_side: str | None = struct.field(pytree_node=False, default=None)

    def valid(self, slots_BS: Array) -> Array | None:
        """Which positions hold something; None where attention need not know."""
        return None if self.padding_side == "right" else slots_BS >= 0


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
        valid_BU = inputs.valid(inputs.wide_slots_BU)
        x_BSD = llama.run_whole(
            first.layers, x_BSD, valid_BU, cfg.llm, remat=cfg.remat, attention=cfg.attention
        )
        I, J = inputs.pixels_BIJYXC.shape[1:3]
        sizes = (inputs.ids_BT.shape[1], I, cfg.patches_per_image(J), cfg.detail_per_image(J))
        x_BSD = inner_compression.squeeze(
            params.compressor, x_BSD, inputs.wide_slots_BU, inputs.slots_BS, sizes, cfg.compressor
        )
    valid_BS = inputs.valid(inputs.slots_BS)
    return llama.apply(llm, x_BSD, valid_BS, cfg.llm, remat=cfg.remat, attention=cfg.attention)


def embed_inputs(params: LlavaMini, inputs: Inputs, cfg: LlavaMiniConfig) -> Array:
    """What the language model reads [B, S, D]: fused text and visual tokens in their places."""
    slots_BS = inputs.wide_slots_BU if cfg.inside_layers else inputs.slots_BS
    text_BTD = embed_text(params, inputs.ids_BT, cfg)
    B, I = inputs.pixels_BIJYXC.shape[:2]
    if I == 0:
        # Text alone is not fused, unless `blank_image` has given it a picture.
        return splice(text_BTD, text_BTD[:, :0], slots_BS)
    text_BFD = prefusion.take_fused(text_BTD, inputs.fuse_BF)
    total_BFD, tokens_BIQD = _encode_rows(params, inputs, text_BFD, cfg)
    text_BTD = put_mean(total_BFD, inputs.frames_BI.sum(axis=1), text_BTD, inputs.fuse_BF)
    return splice(text_BTD, tokens_BIQD.reshape(B, -1, text_BTD.shape[-1]), slots_BS)


def _encode_rows(
    params: LlavaMini, inputs: Inputs, text_BFD: Array, cfg: LlavaMiniConfig
) -> tuple[Array, Array]:
    """(float32 sum of the fused text over each row's frames, visual tokens [B, I, Q, D]).

    Where layers are recomputed, long videos are too, a few frames after the other: each frame is
    fused with the whole text, so all at once would take gigabytes a row.
    """
    B, I = inputs.frames_BI.shape
    together = frames_together(I, sharding.piece((B,), ("batch",))[0], cfg)
    if together == I:
        features_BIJPE = _encode_frames(params, inputs.pixels_BIJYXC, cfg)
        return _fuse_frames(params, features_BIJPE, inputs.frames_BI, text_BFD, cfg)

    def chunks(x: Array) -> Array:
        """[B, I, ...] -> [chunks, B, together, ...]."""
        missing = -I % together
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, together, *x.shape[2:]), 1, 0)

    # Outside of what is recomputed: no gradient goes into the tower, so its features (1.2 MB a
    # frame) are all that a second pass would give.
    features = jax.lax.map(
        lambda pixels_BIJYXC: _encode_frames(params, pixels_BIJYXC, cfg),
        chunks(inputs.pixels_BIJYXC),
    )
    # Gathered once, not for every few frames; where nothing is sharded this moves nothing.
    prefusion_whole = jax.tree.map(lambda w: sharding.gather(w, text_BFD), params.prefusion)
    whole = dataclasses.replace(params, prefusion=prefusion_whole)
    once = chunk_config(cfg)

    def add(total_BFD: Array, some: tuple[Array, Array]) -> tuple[Array, Array]:
        more_BFD, tokens_BIQD = _fuse_frames(whole, *some, text_BFD, once)
        return total_BFD + more_BFD, tokens_BIQD

    # Inside a loop nothing can undo the recomputation, so its costly prevention is not needed.
    add = jax.checkpoint(add, prevent_cse=False)
    zeros_BFD = jnp.zeros_like(text_BFD, jnp.float32)
    total_BFD, tokens = jax.lax.scan(add, zeros_BFD, (features, chunks(inputs.frames_BI)))
    tokens_BIQD = jnp.moveaxis(tokens, 0, 1).reshape(B, -1, *tokens.shape[3:])
    return total_BFD, tokens_BIQD[:, :I]


def frames_together(frames: int, rows: int, cfg: LlavaMiniConfig) -> int:
    """Frames of each row that are fused at a time, of a device that has `rows` rows."""
    if cfg.remat == "none" or frames <= FRAMES_TOGETHER:
        return frames
    return max(1, FRAMES_TOGETHER // rows)


def chunk_config(cfg: LlavaMiniConfig) -> LlavaMiniConfig:
    """How the layers of a few frames are kept, which are recomputed as a whole.

    A third pass through their products would come of recomputing each layer again: these are kept.
    """
    return dataclasses.replace(cfg, remat="matmuls")


def _encode_frames(params: LlavaMini, pixels_BIJYXC: Array, cfg: LlavaMiniConfig) -> Array:
    """The tower's features [B, I, J, P, E]."""
    B, I, *part_shape = pixels_BIJYXC.shape
    features_IJPE = encode_vision(params, pixels_BIJYXC.reshape(B * I, *part_shape), cfg)
    return features_IJPE.reshape(B, I, *features_IJPE.shape[1:])


def _fuse_frames(
    params: LlavaMini,
    features_BIJPE: Array,
    frames_BI: Array,
    text_BFD: Array,
    cfg: LlavaMiniConfig,
) -> tuple[Array, Array]:
    """`_encode_rows` of frames whose features are there."""
    B, I, *part_shape = features_BIJPE.shape
    # `jnp.repeat` wants to be told its sharding on a mesh; this keeps the rows'.
    text_BIFD = jnp.broadcast_to(text_BFD[:, None], (B, I, *text_BFD.shape[1:]))
    tokens_IQD, fused_IFD = fuse_images(
        params,
        features_BIJPE.reshape(B * I, *part_shape),
        text_BIFD.reshape(B * I, *text_BFD.shape[1:]),
        cfg,
    )
    # Summed in float32, as in the release: a long sum in bfloat16 swallows single frames.
    fused_BIFD = fused_IFD.astype(jnp.float32).reshape(B, I, *fused_IFD.shape[1:])
    # Paper section 4.2 pools over the frames of a video; several images do the same.
    total_BFD = jnp.where(frames_BI[:, :, None, None], fused_BIFD, 0.0).sum(axis=1)
    return total_BFD, tokens_IQD.reshape(B, I, *tokens_IQD.shape[1:])


def embed_text(params: LlavaMini, ids_BT: Array, cfg: LlavaMiniConfig) -> Array:
    text_BTD = llama.embed(params.llm, ids_BT, cfg.dtype)
    return jax.lax.stop_gradient(text_BTD) if cfg.detach_text else text_BTD


def encode_images(
    params: LlavaMini, pixels_IJYXC: Array, text_IFD: Array, cfg: LlavaMiniConfig
) -> tuple[Array, Array]:
    """(visual tokens [I, Q, D], fused text [I, F, D]) of images, each with its own text."""
    return fuse_images(params, encode_vision(params, pixels_IJYXC, cfg), text_IFD, cfg)


def fuse_images(
    params: LlavaMini, features_IJPE: Array, text_IFD: Array, cfg: LlavaMiniConfig
) -> tuple[Array, Array]:
    """`encode_images` from the tower's features on."""
    patches_ISD, compressed_IQD = project_and_compress(params, features_IJPE, cfg)
    if params.prefusion is None:
        return compressed_IQD, text_IFD
    tokens_IQD, memory = prefuse_images(params, patches_ISD, compressed_IQD, cfg)
    return tokens_IQD, prefuse_text(params, memory, text_IFD, cfg)


def encode_and_compress(
    params: LlavaMini, pixels_IJYXC: Array, cfg: LlavaMiniConfig
) -> tuple[Array, Array]:
    """(patches [I, S, D], compressed [I, Q, D]) of images in the language model's width."""
    return project_and_compress(params, encode_vision(params, pixels_IJYXC, cfg), cfg)


def encode_vision(params: LlavaMini, pixels_IJYXC: Array, cfg: LlavaMiniConfig) -> Array:
    """The tower's features [I, J, P, E] of images of J parts."""
    I, J = pixels_IJYXC.shape[:2]
    pixels_RYXC = pixels_IJYXC.reshape(I * J, *pixels_IJYXC.shape[2:])
    features_RPE = clip.apply(
        params.vision, pixels_RYXC, cfg.vision, cfg.dtype, attention=cfg.attention
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
        outputs, image_ISD = 0, patches_ISD
    else:
        outputs, image_ISD = compressed_IQD.shape[1], patches_ISD
        if cfg.compressor.kind != "none":  # with "none" the tokens are the patches themselves
            image_ISD = jnp.concatenate([patches_ISD, compressed_IQD], axis=1)
    fused_IQD, memory = prefusion.prefuse_image(
        params.prefusion, image_ISD, outputs, cfg.llm, remat=cfg.remat, attention=cfg.attention
    )
    return fused_IQD if cfg.fuse_compressed else compressed_IQD, memory


def prefuse_text(
    params: LlavaMini, memory: prefusion.ImageMemory, text_IFD: Array, cfg: LlavaMiniConfig
) -> Array:
    """Text after pre-fusion [I, F, D], each row with its own image."""
    assert params.prefusion is not None
    return prefusion.prefuse_text(
        params.prefusion, memory, text_IFD, cfg.llm, remat=cfg.remat, attention=cfg.attention
    )


def put_mean(total_BFD: Array, count_B: Array, text_BTD: Array, fuse_BF: Array) -> Array:
    """The text with sums of its fused part over `count_B` images put in its place, as their mean.

    Where there is no image the text stays as it is.
    """
    # Not 0 / 0, whose gradient is NaN even where `where` takes the other branch.
    mean_BFD = total_BFD / jnp.maximum(count_B, 1)[:, None, None]
    fused_BTD = prefusion.put_fused(text_BTD, mean_BFD, fuse_BF)
    return jnp.where((count_B > 0)[:, None, None], fused_BTD, text_BTD)


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

    return dataclasses.replace(
        tree,
        vision=_unroll(tree.vision),
        prefusion=_unroll(tree.prefusion),
        llm=_unroll(tree.llm),
    )


def _unroll(part: Any) -> Any:
    return part and dataclasses.replace(part, layers=unstack(part.layers))
