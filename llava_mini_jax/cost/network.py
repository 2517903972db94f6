"""The network, described once: each matrix product of a forward pass, and a layer's sizes.

    parameter tree --weights--> numbers of each weight --.
    config, Shape of a batch: how many vectors meet it --+--products--> Product, in model order
                                                                           |
          forward_flops, step_flops (flops.py); the paper's rule (paper_figures.py)

    tower or language model --layer--> Layer: scores, keys and values, MLP, in numbers
                                                                           |
          KV cache, a session's programs (inference_memory.py, session_memory.py), a layer of a
          training step (training/step_memory.py)

A weight's sizes are read from the model's own parameter tree, so they cannot differ from it. What
stands here is what no tree says: how many positions meet each weight, and who attends to what, as
in models/llava_mini.py; tests/cost/test_flops.py holds that to XLA's count of the model. A trace of
the model would say it too, but takes seconds for every shape, and knows nothing of a rule by which
others count.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from llava_mini_jax import params as param_tree
from llava_mini_jax.cost import traced
from llava_mini_jax.errors import InputError
from llava_mini_jax.models import clip, compressors, llava_mini
from llava_mini_jax.models.clip import ClipConfig
from llava_mini_jax.models.compressors.grid import GridConfig
from llava_mini_jax.models.compressors.signature import INSTEAD
from llava_mini_jax.models.llama import LlamaConfig
from llava_mini_jax.models.llava_mini import Inputs, LlavaMiniConfig
from llava_mini_jax.weights.quantize import is_product

COMPONENTS: tuple[str, ...] = ("vision", "projector", "compressor", "prefusion", "llm", "lm_head")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a batch: what decides how much a device computes."""

    rows: int  # B
    images: int  # I: images or frames of a row, padding included
    parts: int  # J: 1 without high resolution
    text: int  # T
    sequence: int  # S: positions of the language model
    fused: int | None = None  # F: text positions that pass through pre-fusion; None: all of T
    wide: int = 0  # U: positions in front of compression inside the language model
    logits: int  # positions of a row whose logits are computed: S - 1 in training, 1 in prefill
    question: int | None = None  # ids of a question that a compressor reads; None: not known

    @property
    def fused_text(self) -> int:
        return self.text if self.fused is None else self.fused


def inputs(cfg: LlavaMiniConfig, shape: Shape) -> Inputs:
    """A batch of these sizes, as abstract arrays."""

    def array(*sizes: int, dtype: type = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((shape.rows, *sizes), dtype)

    side = cfg.vision.image_size
    question = shape.question or cfg.declared.question  # 0: none is read
    return Inputs(
        ids_BT=array(shape.text),
        fuse_BF=array(shape.fused_text),
        pixels_BIJYXC=array(shape.images, shape.parts, side, side, 3, dtype=jnp.uint8),
        frames_BI=array(shape.images, dtype=jnp.bool_),
        slots_BS=array(shape.sequence),
        wide_slots_BU=array(shape.wide) if shape.wide else None,
        question_BIT=array(shape.images, question) if question else None,
        padding_side="right",
    )


# ------------------------------------------------------------------------------- a layer's sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """A transformer layer of the tower or of the language model; its arrays in numbers."""

    width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    mlp_arrays: int  # of that width: before and after the activation, and a gated MLP's gate

    def scores(self, queries: int, keys: int) -> int:
        return self.heads * queries * keys

    def keys_values(self, positions: int) -> int:
        return 2 * positions * self.kv_heads * self.head_width

    def mlp(self, positions: int) -> int:
        return self.mlp_arrays * positions * self.mlp_width


def layer(cfg: ClipConfig | LlamaConfig) -> Layer:
    sizes = dict(width=cfg.width, heads=cfg.heads, mlp_width=cfg.mlp_width)
    if isinstance(cfg, LlamaConfig):
        return Layer(**sizes, kv_heads=cfg.kv_heads, head_width=cfg.head_width, mlp_arrays=3)
    return Layer(**sizes, kv_heads=cfg.heads, head_width=cfg.width // cfg.heads, mlp_arrays=2)


def head(cfg: LlavaMiniConfig) -> str:
    """Path of the weight that gives the logits."""
    return "llm/embed_tokens" if cfg.llm.tied_head else "llm/lm_head"


@functools.cache
def weights(cfg: LlavaMiniConfig) -> dict[str, int]:
    """Numbers of every matrix product's weight, by path; of a stack, those of one layer."""
    return {
        path: math.prod(spec.shape[spec.stacked :])
        for path, spec in param_tree.paths(llava_mini.spec(cfg)).items()
        if is_product(path, spec) or path == head(cfg)
    }


# ------------------------------------------------------------------------ the model as products

Behind = tuple[str, ...]  # parameters by the beginning of their paths: what activations depend on


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product, or several alike, in a forward pass."""

    component: str  # of COMPONENTS
    flops: float  # two a multiply-add
    operands: tuple[Behind, Behind]  # what each of the two depends on
    linear: bool = False  # whether the second one is a weight as it is stored


def products(cfg: LlavaMiniConfig, shape: Shape, *, unread: bool = False) -> Iterator[Product]:
    """All matrix products of a forward pass over a batch.

    `unread`: those too whose outputs nobody reads, as the authors' release computes them: the
    tower's last layers, patches in the language model's width that neither pre-fusion nor the
    language model reads, the last pre-fusion layer and the logits at every position.
    """
    return _Forward(cfg, shape, unread).products()


def projected(cfg: LlavaMiniConfig, parts: int, *, unread: bool = False) -> tuple[int, int]:
    """(patches, compressed tokens) of an image that go through the projector."""
    if cfg.compress == INSTEAD:
        return 0, 0
    features = cfg.compresses and cfg.compress == "features"
    if cfg.prefusion_layers or not cfg.compresses or unread:
        patches = cfg.patches_per_image(parts)
    else:
        patches = 0 if features else cfg.detail_per_image(parts)
    return patches, cfg.tokens_per_image(parts) if features else 0


def prefused(cfg: LlavaMiniConfig, parts: int) -> tuple[int, int]:
    """(positions of an image in pre-fusion, how many of them the language model reads)."""
    tokens = cfg.tokens_per_image(parts) if cfg.fuse_compressed else 0
    added = tokens if cfg.declared.compresses else 0  # else the patches are the tokens
    return cfg.patches_per_image(parts) + added, tokens


@functools.cache
def traced_products(cfg: LlavaMiniConfig, pictures: int, question: int | None) -> list:
    """(FLOPs, what either operand depends on) of a compressor's products: parameters by path, and
    "seen"."""
    vision, dtype, side = cfg.vision, jnp.dtype("float32"), cfg.vision.image_size
    pixels = jax.ShapeDtypeStruct((pictures, side, side, 3), dtype)
    seen = jax.eval_shape(
        lambda tower, pixels: clip.look(tower, pixels, vision, dtype, cfg.declared.reads),
        param_tree.abstract(clip.spec(vision)),
        pixels,
    )
    if cfg.compress == "projected":
        D = cfg.llm.width
        patches = jax.ShapeDtypeStruct((*seen.patches_IPE.shape[:2], D), "float32")
        seen = dataclasses.replace(seen, patches_IPE=patches)
    if question is not None:
        ids = jax.ShapeDtypeStruct((pictures, question), jnp.int32)
        seen = dataclasses.replace(seen, question_IT=ids)
    params = param_tree.abstract(compressors.spec(cfg.compressor))
    names = [frozenset({f"compressor/{path}"}) for path in param_tree.paths(params)]
    names += [frozenset({"seen"})] * len(jax.tree.leaves(seen))
    compress = functools.partial(compressors.apply, cfg=cfg.compressor)
    return traced.products(compress, (params, seen), names)


class _Forward:
    """`products`, a component a method."""

    def __init__(self, cfg: LlavaMiniConfig, shape: Shape, unread: bool):
        self.cfg, self.shape, self.unread = cfg, shape, unread
        self.pictures = shape.rows * shape.images
        self.weights = weights(cfg)

    def products(self) -> Iterator[Product]:
        cfg, rows = self.cfg, self.shape.rows
        behind: Behind = () if cfg.detach_text else ("llm/embed_tokens",)
        if self.pictures:
            yield from self.vision()
            yield from self.tokens()
            behind += ("vision", "projector", "compressor", "prefusion")
            if cfg.prefusion_layers:
                yield from self.prefusion(behind)
        behind += ("llm/layers",)
        if cfg.inside_layers:
            vectors = cfg.inside_layers * rows * self.shape.wide
            yield from self.layers("llm/layers", vectors, self.shape.wide, behind)
            yield from self.compressor(behind)
        S, count = self.shape.sequence, cfg.llm.layers - cfg.inside_layers
        if cfg.declared.drops and self.pictures:
            first, left = cfg.declared.drops
            yield from self.layers("llm/layers", first * rows * S, S, behind)
            # Of one image, which is all that the method's sequence is shorter by.
            S, count = S - (cfg.patches_per_image(self.shape.parts) - left), count - first
        yield from self.layers("llm/layers", count * rows * S, S, behind)
        logits = S if self.unread else self.shape.logits
        last = self.linear(head(cfg), rows * logits, (*behind, "llm/final_norm"))
        yield dataclasses.replace(last, component="lm_head")

    def vision(self) -> Iterator[Product]:
        cfg, parts = self.cfg.vision, self.pictures * self.shape.parts
        yield self.linear("vision/patch_embed", parts * cfg.grid**2, ())
        names = ("patch_embed", "class_token", "position", "pre_norm", "layers")
        behind, S = tuple(f"vision/{name}" for name in names), cfg.positions
        run = functools.partial(self.layers, keys=S, behind=behind)
        yield from run("vision/layers", cfg.used_layers * parts * S)
        if self.cfg.declared.reads.heads_of is not None:
            # A layer's keys again, and the class token's query, for a compressor.
            width = 2.0 * cfg.width * cfg.width
            yield Product("vision", width * parts * (S + 1), (behind, behind))
        if self.unread:
            yield from run("vision/unread_layers", (cfg.layers - cfg.used_layers) * parts * S)

    def tokens(self) -> Iterator[Product]:
        """Projector and compressor, in the order of the dialect."""
        patches, tokens = projected(self.cfg, self.shape.parts, unread=self.unread)
        if patches:
            yield from self.projector(patches, ("vision",))
        if self.cfg.compresses:
            yield from self.compressor(("vision",) if tokens else ("vision", "projector"))
        if tokens:
            yield from self.projector(tokens, ("vision", "compressor"))

    def projector(self, positions: int, behind: Behind) -> Iterator[Product]:
        vectors = self.pictures * positions
        yield self.linear("projector/fc1/kernel", vectors, behind)
        if self.cfg.projector.kind == "mlp2x_gelu":
            yield self.linear("projector/fc2/kernel", vectors, (*behind, "projector/fc1"))

    def compressor(self, behind: Behind) -> Iterator[Product]:
        """`behind` is what the patches depend on."""
        cfg, patches = self.cfg.compressor, self.cfg.detail_per_image(self.shape.parts)
        if not isinstance(cfg, GridConfig):
            yield from self.traced(behind)
            return
        E, Q, all_patches = cfg.width, cfg.grid**2, self.pictures * patches
        own: Behind = ("compressor",)
        either, each = behind + own, 2.0 * Q * all_patches * E
        if cfg.kind == "average_pool":
            yield Product("compressor", each, ((), behind))
        elif cfg.kind == "similarity":
            # With one query the positions that are added to the keys are a fifth of the work.
            yield Product("compressor", 1.0 * all_patches * E, ((), ()))
            yield Product("compressor", each, (behind, own))
            yield Product("compressor", each, (behind, either))
        else:
            # Once for all images: the position table in the patches' size, and the queries.
            if patches != Q:
                yield Product("compressor", 2.0 * patches * Q * E, ((), own))
            vectors = {"q_proj": Q, "k_proj": all_patches, "v_proj": all_patches}
            for name, count in (vectors | {"o_proj": self.pictures * Q}).items():
                yield self.linear(f"compressor/{name}/kernel", count, either)
            yield Product("compressor", 2 * each, (either, either))

    def traced(self, behind: Behind) -> Iterator[Product]:
        """Those of a compressor whose products are read from its trace."""
        cfg, I = self.cfg, self.pictures
        question = self.shape.question if cfg.declared.reads.question else None
        if cfg.declared.reads.question and question is None:
            raise InputError(
                f'the work of compressor "{cfg.compressor.kind}" depends on the length of the'
                " question, which is not known here"
            )
        with traced.without_mesh():
            found = traced_products(cfg, I, question)
        for flops, *operands in found:
            left, right = (
                sum((behind if name == "seen" else (name,) for name in sorted(names)), ())
                for names in operands
            )
            # A trace may have the two in either order.
            left, right = (right, left) if self._is_weight(left) else (left, right)
            yield Product("compressor", flops, (left, right), linear=self._is_weight(right))

    def _is_weight(self, operand: Behind) -> bool:
        return len(operand) == 1 and operand[0] in self.weights

    def prefusion(self, behind: Behind) -> Iterator[Product]:
        layers, pictures, text = self.cfg.prefusion_layers, self.pictures, self.shape.fused_text
        size, read = prefused(self.cfg, self.shape.parts)
        run = functools.partial(self.layers, "prefusion/layers", behind=behind)
        yield from run((layers - 1) * pictures * size, size)
        # The last layer: keys and values of all positions, the rest where it is read.
        last = size if self.unread else read
        yield from run(pictures * last, size, keyed=pictures * size)
        yield from run(layers * pictures * text, size + text)

    def layers(
        self, stack: str, vectors: int, keys: int, behind: Behind, keyed: int | None = None
    ) -> Iterator[Product]:
        """`vectors` in all through layers of a stack, each of which attends to `keys`.

        `keyed` vectors give keys and values if those are not the same.
        """
        component, keyed = stack.split("/")[0], vectors if keyed is None else keyed
        for path in self.weights:
            if path.startswith(f"{stack}/"):
                into_keys = "/k_proj" in path or "/v_proj" in path
                yield self.linear(path, keyed if into_keys else vectors, behind)
        sizes = layer(self.cfg.vision if component == "vision" else self.cfg.llm)
        attention = 4.0 * vectors * sizes.scores(1, keys) * sizes.head_width
        yield Product(component, attention, (behind, behind))

    def linear(self, path: str, vectors: int, behind: Behind) -> Product:
        """`vectors`, which depend on `behind`, times a weight."""
        flops = 2.0 * vectors * self.weights[path]
        return Product(path.split("/")[0], flops, (behind, (path,)), linear=True)
