"""What a training step takes of a device's memory, worked out before a device is there.

    stage, mesh --shapes of one device--> parameters + optimiser state + batch    (always there)
                                          + the largest of the step's phases:
        loss        float32 sums | kept activations | logits, their softmax and their gradient
        language    float32 sums | gradients        | kept activations | one layer's work
        fusion      float32 sums | gradients        | those of pre-fusion | one layer's work
        vision      float32 sums | one layer's work on all parts of all images
        update      gradients, and new moments before they may take the place of the old ones

Sizes are arithmetic on shapes. What the backward pass keeps of the forward one is asked of JAX,
which lists it while tracing: no formula of ours would follow every change of a layer or of `remat`.
What the compiler makes of it is its own matter: tests/training/test_memory.py says how far off
this is on CPU. Not counted: the runtime's own memory, fragmentation, and work of the compressor.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llava_mini_jax import params as param_tree
from llava_mini_jax import sharding
from llava_mini_jax.cost import network
from llava_mini_jax.cost.device_memory import FLOAT32, Memory, tree_bytes
from llava_mini_jax.models import decoder, llama, llava_mini
from llava_mini_jax.models.llava_mini import Inputs, LlavaMini, LlavaMiniConfig
from llava_mini_jax.models.lora import with_changes
from llava_mini_jax.ops.attention import attend
from llava_mini_jax.ops.masks import Mask
from llava_mini_jax.params import ParamSpec, Tree
from llava_mini_jax.sharding import MeshConfig
from llava_mini_jax.training.lora import with_base
from llava_mini_jax.training.stages import TrainConfig, stacked_spec
from llava_mini_jax.training.step_program import fused_of
from llava_mini_jax.weights.quantize import abstract_int4, group_of

GROUPS = {
    "trained parameters": "parameters",
    "frozen parameters": "parameters",
    "first moments": "optimiser state",
    "second moments": "optimiser state",
    "gradients and new moments": "gradients",
    "gradients": "gradients",
    "float32 sums of gradients": "gradients",
}
OTHERS = "activations"  # every other term
HEAD = ("llm/lm_head", "llm/embed_tokens")


def estimate(stage: TrainConfig, images: int = 1) -> Memory:
    """Memory of a step over rows of the longest bucket, with `images` images or frames each."""
    rows = _share(stage.batch_size // stage.accumulate, stage.mesh.batch_shards)
    piece = _Piece(stage, rows, images)
    return Memory(always=piece.always(), phases=piece.phases())


def groups(found: Memory) -> dict[str, int]:
    """The terms at the peak, added up to four."""
    terms = found.terms.items()
    return {
        group: sum(size for term, size in terms if GROUPS.get(term, OTHERS) == group)
        for group in ("parameters", "optimiser state", "gradients", OTHERS)
    }


class _Piece:
    """One device's piece of a stage: its rows, and the model with its share of each axis."""

    def __init__(self, stage: TrainConfig, rows: int, images: int, *, looped: bool = False):
        """`looped`: the images are some frames of a long video."""
        self.stage, self.rows, self.images = stage, rows, images
        self.length = stage.lengths[-1]
        self.cfg = _local(stage.model, stage.mesh.tensor)
        self.spec = with_changes(llava_mini.spec(self.cfg), stage.lora)
        if looped or self.images_together < rows * images:  # as llava_mini.py goes through them
            layers = llava_mini.unrolled(self.spec).prefusion
            self.spec = dataclasses.replace(self.spec, prefusion=layers)
        # Bytes of a parameter and of its first moment.
        self.size = jnp.dtype(stage.param_dtype).itemsize
        self.first = jnp.dtype(stage.optimizer.first_moment_dtype).itemsize

    def always(self) -> dict[str, int]:
        trained, size, inputs = self.count(True), self.size, self.inputs()
        batch = (inputs, inputs.slots_BS)  # labels are as large as slots
        return {
            "trained parameters": trained * size,
            "frozen parameters": self.frozen(),
            "first moments": trained * self.first,
            "second moments": trained * FLOAT32,
            "batch": self.stage.accumulate * tree_bytes(batch),
        } | self.rounded()

    def rounded(self) -> dict[str, int]:
        """Weights in the dtype of products: compilers cast them in front of the micro-batches."""
        narrow = self.cfg.dtype.itemsize
        if self.stage.accumulate == 1 or narrow >= self.size:
            return {}
        return {"weights as products take them": (self.count(True) + self.count(False)) * narrow}

    def phases(self) -> dict[str, dict[str, int]]:
        trained, size = self.count(True), self.size
        head, llm = self.count(True, *HEAD) * size, self.count(True, "llm/*") * size
        # Adam computes in float32: a first moment of another dtype is rounded from one of that.
        moments = trained * (FLOAT32 + (self.first if self.first != FLOAT32 else 0))
        accumulates = self.stage.accumulate > 1
        sums = {"float32 sums of gradients": trained * FLOAT32} if accumulates else {}
        front = {"kept before the language model": self.kept_in_front()}
        kept = sums | front | {"kept of its layers": self.kept_of_llm()}
        layer = self.work(self.length, self.length, self.rows)
        fusion = sums | {"gradients": trained * size} | front
        return {
            "loss": kept | {"logits": self.logits(), "gradients": head} | self.whole_head(),
            "language model": kept | {"gradients": llm, "work of a layer": layer},
            "fusion": fusion | {"work of a layer": self.work_in_front()} | self.kept_of_some(),
            "vision": sums | {"work of a layer": self.work_of_vision()},
            "update": {"gradients and new moments": trained * size + moments},
        }

    def count(self, trained: bool, *patterns: str) -> int:
        """Of the device's parameters: those that are trained or not, and match a pattern."""
        stage, count = self.stage, 0
        with sharding.planned_mesh(stage.mesh):
            for path, leaf in param_tree.paths(stacked_spec(stage)).items():
                chosen = param_tree.matches(path, stage.trainable) == trained
                if chosen and (not patterns or param_tree.matches(path, patterns)):
                    count += math.prod(sharding.piece(leaf.shape, leaf.axes))
        return count

    def frozen(self) -> int:
        """Bytes of the device's frozen parameters: beside adapters they may be int8 or int4."""
        if self.stage.lora.base == "same":
            return self.count(False) * self.size
        with sharding.planned_mesh(self.stage.mesh):
            leaves = param_tree.paths(stacked_spec(self.stage)).items()
            bases = [leaf for path, leaf in leaves if param_tree.matches(path, ("*/base",))]
            narrow = sum(base_bytes(leaf, self.stage) for leaf in bases)
        return (self.count(False) - self.count(False, "*/base")) * self.size + narrow

    def inputs(self) -> Inputs:
        """Of a micro-batch, as abstract arrays."""
        parts, S = self.stage.images.parts, self.length
        sizes = dict(rows=self.rows, images=self.images, parts=parts, text=S, sequence=S)
        wide = S if self.cfg.inside_layers else 0
        shape = network.Shape(**sizes, wide=wide, logits=S - 1, fused=fused_of(self.stage))
        return network.inputs(self.cfg, shape)

    def kept_of_some(self) -> dict[str, int]:
        """Of a long video a few frames at a time are gone through again: what they keep then."""
        if self.images_together == self.rows * self.images:
            return {}
        stage = dataclasses.replace(self.stage, model=llava_mini.chunk_config(self.stage.model))
        few = _Piece(stage, self.rows, self.images_together // self.rows, looped=True)
        return {"kept of some frames": few.kept_in_front()} | self.gathered()

    def gathered(self) -> dict[str, int]:
        """Pre-fusion's weights, whole in front of the loop over frames, and their gradients.

        The gradient of the newest frames stands beside the sum, in the dtype of products.
        """
        if self.stage.mesh.fsdp == 1 or self.cfg.prefusion_layers == 0:
            return {}
        count = param_tree.count(self.spec.prefusion)
        found = {"pre-fusion whole": count * self.whole("prefusion/*")}
        if self.count(True, "prefusion/*"):
            found["pre-fusion's gradient of some frames"] = count * self.cfg.dtype.itemsize
        return found

    def whole(self, *patterns: str) -> int:
        """Bytes of a gathered parameter: itself, cast for its products, and its gradient."""
        trained = 2 if self.count(True, *patterns) else 1
        return trained * self.size + self.cfg.dtype.itemsize

    def kept_in_front(self) -> int:
        """Of vision, projector, compressor, pre-fusion and embedding."""

        def front(params: LlavaMini, inputs: Inputs) -> jax.Array:
            return llava_mini.embed_inputs(params, inputs, self.cfg)

        return self._kept(front, self.inputs())

    def kept_of_llm(self) -> int:
        cfg, hidden = self.cfg, self._hidden(self.rows, self.length)

        def language(params: LlavaMini, x_BSD: jax.Array) -> jax.Array:
            return llama.apply(
                params.llm, x_BSD, None, cfg.llm, remat=cfg.remat, attention=cfg.attention
            )

        return self._kept(language, hidden, through=True)

    def work(self, queries: int, keys: int, rows: int) -> int:
        """One decoder layer's, recomputed and gone through backwards, and its gathered weights."""
        cfg = self.cfg
        layer = param_tree.abstract(decoder.block_spec(cfg.llm), self.stage.param_dtype)
        K, H = cfg.llm.kv_heads, cfg.llm.head_width
        earlier = jax.ShapeDtypeStruct((rows, K, keys - queries, H), cfg.dtype)
        args = layer, self._hidden(rows, queries), earlier, earlier

        def block(layer: Any, x: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            def remember(*new: jax.Array) -> Any:
                return *(jnp.concatenate(p, axis=2) for p in zip((k, v), new, strict=True)), None

            angles = jnp.zeros((rows, queries, H // 2), jnp.float32)
            attends = attend(Mask(first=keys - queries, window=cfg.llm.window), cfg.attention)
            own = decoder.Layer(layer, None)
            return decoder.block(own, x, angles, attends, cfg.llm, remember)[0]

        trained = self.count(True, "llm/layers/*")

        def backward(args: Any) -> Any:
            layer, *activations = args
            if trained:
                return jax.vjp(block, *args)[1]
            return jax.vjp(functools.partial(block, layer), *activations)[1]

        # TPU's kernel has no window: there the scores are there.
        fused = _fuses(cfg) and cfg.llm.window is None
        recomputed = 0 if cfg.remat == "none" else _kept(backward, args, fused)
        # Gradients of the widest arrays stand beside them: of attention's scores, or in the MLP.
        sizes = network.layer(cfg.llm)
        scores = 0 if fused else rows * sizes.scores(queries, keys) * FLOAT32
        widest = max(scores, sizes.mlp(rows * queries) * cfg.dtype.itemsize)
        # Whole weights: gathered, or widened from 4 bits.
        whole = self.stage.mesh.fsdp > 1 or self.stage.lora.base == "int4"
        gathered = param_tree.count(layer) * cfg.dtype.itemsize if whole else 0
        return recomputed + widest + gathered

    @property
    def images_together(self) -> int:
        """Images and frames that are computed at a time: of a long video a few (llava_mini.py)."""
        return self.rows * llava_mini.frames_together(self.images, self.rows, self.cfg)

    def work_in_front(self) -> int:
        if not self.cfg.prefusion_layers:
            return 0
        seen, images = self.cfg.patches_per_image(self.stage.images.parts), self.images_together
        fused = fused_of(self.stage)
        text = self.work(fused, seen + fused, images)
        return max(text, self.work(seen, seen, images))

    def work_of_vision(self) -> int:
        """One layer of the tower, forwards: two arrays of attention scores, or the MLP's."""
        tower, tensor = self.cfg.vision, self.stage.mesh.tensor
        heads, width = (_share(n, tensor) for n in (tower.heads, tower.mlp_width))
        layer = dataclasses.replace(network.layer(tower), heads=heads, mlp_width=width)
        pictures, S = self.images_together * self.stage.images.parts, tower.positions
        scores = 0 if _fuses(self.cfg) else 2 * layer.scores(S, S) * FLOAT32
        mlp = layer.mlp(S) * self.cfg.dtype.itemsize
        return pictures * max(scores, mlp)

    def logits(self) -> int:
        """Of all positions or of a chunk; their softmax; what the head's gradient is made of."""
        positions = min(self.stage.loss_chunk or self.length, self.length)
        copies = 3 if self.count(True, *HEAD) else 2
        return copies * self.rows * positions * self.cfg.llm.vocab_size * FLOAT32

    def whole_head(self) -> dict[str, int]:
        """The head, gathered in front of the loop over chunks of logits, and its gradient."""
        loops = 0 < self.stage.loss_chunk < self.length - 1
        if self.stage.mesh.fsdp == 1 or not loops:
            return {}
        count = self.cfg.llm.vocab_size * self.cfg.llm.width
        return {"head whole": count * self.whole(*HEAD)}

    def _hidden(self, rows: int, positions: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, positions, self.cfg.llm.width), self.cfg.dtype)

    def _kept(self, function: Callable, inputs: Any, through: bool = False) -> int:
        """What `function(params, inputs)` keeps for gradients of the trained parameters.

        With `through`, for that of its inputs too.
        """
        params = with_base(param_tree.abstract(self.spec, self.stage.param_dtype), self.stage.lora)
        trained, frozen = param_tree.split(
            params, lambda path: param_tree.matches(path, self.stage.trainable)
        )

        def backward(args: tuple) -> Any:
            trained, frozen, inputs = args

            def call(trained: Tree, inputs: Any) -> jax.Array:
                return function(param_tree.merge(trained, frozen), inputs)

            if through:
                return jax.vjp(call, trained, inputs)[1]
            return jax.vjp(lambda trained: call(trained, inputs), trained)[1]

        return _kept(backward, (trained, frozen, inputs), _fuses(self.cfg))


def base_bytes(leaf: ParamSpec, stage: TrainConfig) -> int:
    """Of a device's piece of a weight beside its adapter, under the current mesh.

    int8's scales, less than 0.1 %, are left out.
    """
    narrow = stage.lora.base
    if narrow != "int4":
        itemsize = 1 if narrow == "int8" else jnp.dtype(stage.param_dtype).itemsize
        return math.prod(sharding.piece(leaf.shape, leaf.axes)) * itemsize
    size = group_of(math.prod(leaf.shape[leaf.output_axes :]))
    assert size is not None  # training/lora.py has checked it
    parts = jax.tree.leaves(abstract_int4(leaf, leaf.output_axes, size, jnp.float16))
    return sum(math.prod(_piece(part)) * part.dtype.itemsize for part in parts)


def _piece(x: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    return x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)


def _local(cfg: LlavaMiniConfig, tensor: int) -> LlavaMiniConfig:
    """A model whose sizes are one device's share of the tensor axis."""
    heads = _share(cfg.llm.heads, tensor)
    # Key heads that are not divided are repeated for the query heads (ops/attention.py).
    divided = cfg.llm.kv_heads % tensor == 0 or heads == cfg.llm.heads
    llm = dataclasses.replace(
        cfg.llm,
        heads=heads,
        kv_heads=_share(cfg.llm.kv_heads, tensor) if divided else heads,
        mlp_width=_share(cfg.llm.mlp_width, tensor),
        vocab_size=_share(cfg.llm.vocab_size, tensor),
    )
    return dataclasses.replace(cfg, llm=llm)


def _share(size: int, devices: int) -> int:
    """What a device has of a dimension; one that is not divided evenly stays whole."""
    return size if size % devices else size // devices


def _fuses(cfg: LlavaMiniConfig) -> bool:
    """Whether attention is fused on any accelerator: no scores are there, whatever is kept.

    Float16 is a matter of CUDA's kernel alone, and is counted as if it had none: an estimate may
    be too high, not too low.
    """
    everywhere = cfg.attention != "xla" and cfg.dtype == jnp.bfloat16
    return everywhere or (cfg.attention == "cudnn" and cfg.dtype.itemsize < FLOAT32)


def _kept(backward: Callable, args: Any, fused: bool) -> int:
    """Bytes of the arrays that `backward(args)`, a function of JAX's vjp, holds beside `args`."""
    # TPU's kernel can be traced anywhere; CUDA's keeps the same arrays.
    planned = sharding.planned_mesh(MeshConfig(), "tpu") if fused else contextlib.nullcontext()
    with planned:
        jaxpr = jax.make_jaxpr(backward)(args).jaxpr
    given = {id(var) for var in (*jaxpr.invars, *jaxpr.constvars)}
    held = {id(var): var.aval for var in jaxpr.outvars if id(var) not in given}
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in held.values() if hasattr(a, "shape"))
