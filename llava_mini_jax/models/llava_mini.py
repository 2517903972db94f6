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
whole image last; 1 without high resolution), Y X C pixels, P patches of a part, S image positions
in pre-fusion or LLM positions, Q compressed tokens of an image, T text, F text that takes part in
pre-fusion, D language width.

LLaVA-1.5, the paper's ablations and the compressors that it is compared with are configurations of
the same code: compressor "none" and no pre-fusion layers is LLaVA-1.5. What a compressor reads and
where it sits it declares itself (models/compressors/).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from llava_mini_jax import sharding
from llava_mini_jax.models import clip, compressors, inner_compression, llama, prefusion, projector
from llava_mini_jax.models.compressors import Compressed, CompressorConfig, Declaration, place
from llava_mini_jax.models.compressors.signature import FEATURES, INSTEAD, PROJECTED, Taken
from llava_mini_jax.models.parts import what_is_compressed
from llava_mini_jax.models.seen import Seen
from llava_mini_jax.models.splice import repeat_last, splice, splice_valid
from llava_mini_jax.models.texts import OneText, Packed, PackedTexts
from llava_mini_jax.ops.attention import check_attention
from llava_mini_jax.ops.layers import check_remat
from llava_mini_jax.ops.norm import rms_norm
from llava_mini_jax.params import Array, Leaf, unstack

FRAMES_TOGETHER = 8  # of a device's rows, where a backward pass computes them again


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaMiniConfig:
    vision: clip.ClipConfig
    projector: projector.ProjectorConfig
    compressor: CompressorConfig
    compress: str  # "projected" patches (paper), vision "features" (release), or "instead" of both
    prefusion_layers: int  # 0: no pre-fusion
    # Compressed tokens pass through pre-fusion (release) or bypass it (paper)
    fuse_compressed: bool
    detach_text: bool  # no gradient from the inputs into the embedding table (release)
    inside_layers: int  # > 0: compression after that many LLM layers (paper E.3), no pre-fusion
    llm: llama.LlamaConfig
    compute_dtype: str  # of activations: float32, bfloat16 or float16
    remat: str  # what layers keep for the backward pass: "none", "matmuls", "attention" or "full"
    attention: str = "auto"  # or one implementation: "xla", "cudnn" or "splash"

    def __post_init__(self):
        check_remat(self.remat)
        check_attention(self.attention)
        kind, declared = self.compressor.kind, self.declared
        place.check(
            kind,
            declared,
            self.compress,
            prefusion_layers=self.prefusion_layers,
            fuse_compressed=self.fuse_compressed,
            inside_layers=self.inside_layers,
            layers=self.llm.layers,
            vocabulary=self.llm.vocab_size,
        )
        place.check_widths(kind, declared, self.vision.width, self.llm.width)
        clip.check_reads(declared.reads, self.vision)
        compressors.tokens(self.compressor, self.vision.grid)  # ValueError for a count it has not
        if self.prefusion_layers < 0:
            raise ValueError(f"{self.prefusion_layers} pre-fusion layers; give 0 (none) or more")
        if not 0 <= self.inside_layers < self.llm.layers:
            raise ValueError(f"inside_layers {self.inside_layers} of {self.llm.layers} LLM layers")

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute_dtype)

    @property
    def declared(self) -> Declaration:
        """What the compressor needs and is."""
        return compressors.declare(self.compressor)

    @property
    def compresses(self) -> bool:
        """Whether images are compressed in front of the language model."""
        return self.declared.compresses and not self.inside_layers

    @property
    def keeps_cache(self) -> bool:
        """Whether answers may keep keys and values: what an image gives never changes."""
        if self.declared.inside:
            # A window counts positions that have left the cache.
            return self.declared.keeps is not None and self.llm.window is None
        return not self.inside_layers

    def tokens_per_image(self, parts: int) -> int:
        """Q: visual tokens that an image of J parts gives the language model, at most; where
        requests choose, those of one that does not."""
        if not self.declared.compresses:
            return self.patches_per_image(parts)
        return compressors.tokens(self.compressor, round(self.detail_per_image(parts) ** 0.5))

    def patches_per_image(self, parts: int) -> int:
        return self.vision.grid**2 * parts

    def detail_per_image(self, parts: int) -> int:
        """Patches of an image that are compressed: not those of the whole beside its parts."""
        return self.patches_per_image(max(parts - 1, 1))

    def positions_per_image(self, parts: int) -> int:
        """Visual tokens of an image in front of the language model's first layer."""
        inside = self.inside_layers > 0
        return self.patches_per_image(parts) if inside else self.tokens_per_image(parts)

    def taken(self, parts: int, count: int | None = None) -> Taken:
        """Which of an image's tokens stand in the sequence of a request that asks for `count`."""
        own, choice = self.positions_per_image(parts), self.declared.choice
        if choice is None:
            return Taken(0, own, own)
        return choice.taken(own if count is None else count)


@struct.dataclass
class LlavaMini:
    vision: clip.Clip
    projector: Any  # a projector.Projector; None where the compressor is the projector
    compressor: Any  # its own struct; None where it has no parameters
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
    # int32 ids of what each image is looked at for, if a compressor reads that; -1: padding.
    question_BIT: Leaf = None
    packed: Packed | None = None  # where rows hold several conversations; `fuse_BF` is empty then
    # Where `slots_BS` is padded: "right" or "left"; None: not known. On the right no valid position
    # sees padding, causal as attention is, and kernels need not be told of it.
    padding_side: str | None = struct.field(pytree_node=False, default=None)

    def valid(self, slots_BS: Array) -> Array | None:
        """Which positions hold something; None where attention need not know."""
        return None if self.padding_side == "right" else slots_BS >= 0


def spec(cfg: LlavaMiniConfig) -> LlavaMini:
    return LlavaMini(
        vision=clip.spec(cfg.vision),
        projector=None if cfg.compress == INSTEAD else projector.spec(cfg.projector),
        compressor=compressors.spec(cfg.compressor),
        prefusion=prefusion.spec(cfg.prefusion_layers, cfg.llm),
        llm=llama.spec(cfg.llm),
    )


def apply(params: LlavaMini, inputs: Inputs, cfg: LlavaMiniConfig) -> Array:
    """Hidden states [B, S, D] of the language model, after its final norm.

    Where an image has fewer tokens than slots, an empty slot has the state before it: whatever
    follows is predicted from the last token that is there.
    """
    (x_BSD, valid_BS), llm = embed(params, inputs, cfg), params.llm
    segments_BS = None if inputs.packed is None else inputs.packed.segments_BS
    if segments_BS is not None and (cfg.declared.inside or cfg.inside_layers):
        raise ValueError("compression inside the language model cannot read packed rows")
    if cfg.declared.inside:
        how = compressors.How(cfg.llm, cfg.remat, cfg.attention)
        placed = _placed(inputs, cfg)
        x_BSD = compressors.run(params.compressor, llm, x_BSD, placed, cfg.compressor, how)
        return rms_norm(x_BSD, llm.final_norm, cfg.llm.norm_eps)
    if cfg.inside_layers:
        first, llm = inner_compression.split_llm(params.llm, cfg.inside_layers)
        x_BSD = llama.run_whole(
            first.layers, x_BSD, valid_BS, cfg.llm, remat=cfg.remat, attention=cfg.attention
        )
        I, J = inputs.pixels_BIJYXC.shape[1:3]
        sizes = (inputs.ids_BT.shape[1], I, cfg.patches_per_image(J), cfg.detail_per_image(J))
        x_BSD = inner_compression.squeeze(
            params.compressor, x_BSD, inputs.wide_slots_BU, inputs.slots_BS, sizes, cfg.compressor
        )
        valid_BS = inputs.valid(inputs.slots_BS)
    holes, how = cfg.declared.adaptive, dict(remat=cfg.remat, attention=cfg.attention)
    x_BSD = llama.apply(llm, x_BSD, valid_BS, cfg.llm, holes=holes, segments_BT=segments_BS, **how)
    return repeat_last(x_BSD, valid_BS) if holes and valid_BS is not None else x_BSD


def _placed(inputs: Inputs, cfg: LlavaMiniConfig) -> compressors.Placed:
    """What stands where, for a method that goes on inside the language model."""
    J, text = inputs.pixels_BIJYXC.shape[2], inputs.ids_BT.shape[1]
    visual_BS = inputs.slots_BS - text
    return compressors.Placed(
        valid_BS=inputs.slots_BS >= 0,
        visual_BS=visual_BS >= 0,
        place_BS=visual_BS % cfg.tokens_per_image(J),
        patches=cfg.patches_per_image(J),
    )


def embed_inputs(params: LlavaMini, inputs: Inputs, cfg: LlavaMiniConfig) -> Array:
    """What the language model reads [B, S, D]: fused text and visual tokens in their places."""
    return embed(params, inputs, cfg)[0]


def embed(params: LlavaMini, inputs: Inputs, cfg: LlavaMiniConfig) -> tuple[Array, Array | None]:
    """`embed_inputs`, and which positions hold something (`Inputs.valid`)."""
    slots_BS = inputs.wide_slots_BU if cfg.inside_layers else inputs.slots_BS
    text_BTD = embed_text(params, inputs.ids_BT, cfg)
    B, I = inputs.pixels_BIJYXC.shape[:2]
    if I == 0:
        # Text alone is not fused, unless `blank_image` has given it an image.
        return splice(text_BTD, text_BTD[:, :0], slots_BS), inputs.valid(slots_BS)
    if inputs.packed is None:
        texts = OneText.of(text_BTD, inputs.fuse_BF, inputs.frames_BI)
    else:
        texts = PackedTexts(text_BTD, inputs.packed)
    text_BTD, visual = _encode_rows(params, inputs, texts, cfg)
    visual_BVD = visual.tokens_IQE.reshape(B, -1, text_BTD.shape[-1])
    if visual.valid_IQ is None:
        valid_BS = inputs.valid(slots_BS)
    else:
        valid_BS = splice_valid(inputs.ids_BT, visual.valid_IQ.reshape(B, -1), slots_BS)
    return splice(text_BTD, visual_BVD, slots_BS), valid_BS


def _encode_rows(
    params: LlavaMini, inputs: Inputs, texts: OneText | PackedTexts, cfg: LlavaMiniConfig
) -> tuple[Array, Compressed]:
    """(the rows' text with what pre-fusion made of it, visual tokens [B, I, Q, D]).

    Where layers are recomputed, long videos are too, a few frames after the other: each frame is
    fused with the whole text, so all at once would take gigabytes a row.
    """
    B, I = inputs.frames_BI.shape
    together = frames_together(I, sharding.piece((B,), ("batch",))[0], cfg)
    if together == I:
        seen = _encode_frames(params, inputs.pixels_BIJYXC, cfg)
        seen = dataclasses.replace(seen, question_IT=inputs.question_BIT)
        total, visual = _fuse_frames(params, seen, texts, texts.each, cfg)
        return texts.put(total), visual

    def chunks(x: Array) -> Array:
        """[B, I, ...] -> [chunks, B, together, ...]."""
        missing = -I % together
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, together, *x.shape[2:]), 1, 0)

    # Outside of what is recomputed: no gradient goes into the tower, so its features (1.2 MB a
    # frame) are all that a second pass would give.
    seen = jax.lax.map(
        lambda pixels_BIJYXC: _encode_frames(params, pixels_BIJYXC, cfg),
        chunks(inputs.pixels_BIJYXC),
    )
    question = jax.tree.map(chunks, inputs.question_BIT)
    seen = dataclasses.replace(seen, question_IT=question)
    # Gathered once, not for every few frames; where nothing is sharded this moves nothing. A layer
    # at a time: the gradient of some frames would stand beside the sum as a stack and as its parts.
    prefusion_whole = jax.tree.map(
        lambda w: sharding.gather(w, texts.text_BTD), _unroll(params.prefusion)
    )
    whole = dataclasses.replace(params, prefusion=prefusion_whole)
    once = chunk_config(cfg)

    def add(total: Array, some: tuple[Seen, Any]) -> tuple[Array, Compressed]:
        seen, each = some
        more, visual = _fuse_frames(whole, seen, texts, each, once)
        return total + more, visual

    # Inside a loop nothing can undo the recomputation, so its costly prevention is not needed.
    add = jax.checkpoint(add, prevent_cse=False)
    each = jax.tree.map(chunks, texts.each)
    total, visual = jax.lax.scan(add, texts.nothing(), (seen, each))

    def rows(x: Array) -> Array:
        """[chunks, B, together, ...] -> [B, I, ...]."""
        return jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :I]

    return texts.put(total), jax.tree.map(rows, visual)


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


def _encode_frames(params: LlavaMini, pixels_BIJYXC: Array, cfg: LlavaMiniConfig) -> Seen:
    """What the tower hands over of each frame, [B, I, J, ...]."""
    B, I, *part_shape = pixels_BIJYXC.shape
    seen = encode_vision(params, pixels_BIJYXC.reshape(B * I, *part_shape), cfg)
    return jax.tree.map(lambda x: x.reshape(B, I, *x.shape[1:]), seen)


def _fuse_frames(
    params: LlavaMini, seen: Seen, texts: OneText | PackedTexts, each: Any, cfg: LlavaMiniConfig
) -> tuple[Array, Compressed]:
    """(sums as `texts.add` gives them, visual tokens [B, I, Q, D]) of frames that the tower has
    seen; `each` is what `texts` knows of them."""
    text_BIFD = texts.read(each)
    B, I, *text_shape = text_BIFD.shape
    seen = jax.tree.map(lambda x: x.reshape(B * I, *x.shape[2:]), seen)
    visual, fused_IFD = fuse_images(params, seen, text_BIFD.reshape(B * I, *text_shape), cfg)
    total = texts.add(fused_IFD.reshape(B, I, *fused_IFD.shape[1:]), each)
    return total, jax.tree.map(lambda x: x.reshape(B, I, *x.shape[1:]), visual)


def embed_text(params: LlavaMini, ids_BT: Array, cfg: LlavaMiniConfig) -> Array:
    text_BTD = llama.embed(params.llm, ids_BT, cfg.dtype)
    return jax.lax.stop_gradient(text_BTD) if cfg.detach_text else text_BTD


def encode_images(
    params: LlavaMini, pixels_IJYXC: Array, text_IFD: Array, cfg: LlavaMiniConfig
) -> tuple[Array, Array]:
    """(visual tokens [I, Q, D], fused text [I, F, D]) of images, each with its own text."""
    visual, fused_IFD = fuse_images(params, encode_vision(params, pixels_IJYXC, cfg), text_IFD, cfg)
    if visual.valid_IQ is not None:
        raise ValueError("images have different numbers of tokens: use fuse_images")
    return visual.tokens_IQE, fused_IFD


def fuse_images(
    params: LlavaMini, seen: Seen, text_IFD: Array, cfg: LlavaMiniConfig
) -> tuple[Compressed, Array]:
    """(visual tokens in the LLM's width, fused text) of images that the tower has seen."""
    patches_ISD, compressed = project_and_compress(params, seen, cfg)
    if params.prefusion is None:
        return compressed, text_IFD
    tokens_IQD, memory = prefuse_images(params, patches_ISD, compressed.tokens_IQE, cfg)
    fused_IFD = prefuse_text(params, memory, text_IFD, cfg)
    return dataclasses.replace(compressed, tokens_IQE=tokens_IQD), fused_IFD


def encode_and_compress(
    params: LlavaMini, pixels_IJYXC: Array, cfg: LlavaMiniConfig
) -> tuple[Array, Array]:
    """(patches [I, S, D], compressed [I, Q, D]) of images in the language model's width."""
    seen = encode_vision(params, pixels_IJYXC, cfg)
    patches_ISD, compressed = project_and_compress(params, seen, cfg)
    return patches_ISD, compressed.tokens_IQE


def encode_vision(params: LlavaMini, pixels_IJYXC: Array, cfg: LlavaMiniConfig) -> Seen:
    """What the tower hands over of images of J parts, [I, J, ...]: just what is read of them."""
    I, J = pixels_IJYXC.shape[:2]
    place.check_pictures(cfg.compressor.kind, cfg.declared, I, J)
    pixels_RYXC = pixels_IJYXC.reshape(I * J, *pixels_IJYXC.shape[2:])
    reads = cfg.declared.reads
    seen = clip.look(
        params.vision, pixels_RYXC, cfg.vision, cfg.dtype, reads, attention=cfg.attention
    )
    return jax.tree.map(lambda x: x.reshape(I, J, *x.shape[1:]), seen)


def project_and_compress(
    params: LlavaMini, seen: Seen, cfg: LlavaMiniConfig
) -> tuple[Array, Compressed]:
    """(patches [I, S, D], tokens [I, Q, D]) from what the tower has seen, [I, J, ...], on.

    A compressor that is the projector leaves no patches (S = 0). High resolution (J = k*k + 1):
    the sub-images' patches are one map of k times the side, which alone is compressed; in
    pre-fusion the whole image's patches follow it (paper section 4.2).
    """
    detail, whole_IPE = what_is_compressed(seen)
    patches_ISD = detail.patches_IPE[:, :0]
    if params.projector is not None:
        patches_ISD = detail_ISD = projector.apply(params.projector, detail.patches_IPE)
        if whole_IPE is not None:
            whole_IPD = projector.apply(params.projector, whole_IPE)
            patches_ISD = jnp.concatenate([detail_ISD, whole_IPD], axis=1)
        if not cfg.compresses:
            # The whole image's patches are tokens, too: LLaVA-1.5 at 672 pixels has 5 x 576.
            # With compression inside the LLM they stay so until its layer is reached.
            return patches_ISD, Compressed(patches_ISD)
        if cfg.compress == PROJECTED:
            detail = dataclasses.replace(detail, patches_IPE=detail_ISD)
    compressed = compressors.apply(params.compressor, detail, cfg.compressor)
    tokens_IQD = compressed.tokens_IQE
    if params.projector is not None and cfg.compress == FEATURES:
        tokens_IQD = projector.apply(params.projector, tokens_IQD)
    # What the queries look at is for those who call the compressor by itself.
    return patches_ISD, Compressed(tokens_IQD, valid_IQ=compressed.valid_IQ)


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
        if cfg.declared.compresses:  # else the tokens are the patches themselves
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
