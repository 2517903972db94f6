"""Memory of inference: weights, keys and values of a picture or frame, and the peak of a request.

    config --spec--> bytes of every component's weights, in float32, bfloat16 and int8
           --shape of the cache--> bytes a token, a picture, a frame
           --compile abstract programs--> what each takes; nothing is allocated
           --run, on an accelerator--> what its allocator says

Training's memory is in training/step_memory.py.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from llava_mini_jax import params as param_tree
from llava_mini_jax.cost.latency import Request
from llava_mini_jax.inference import generate
from llava_mini_jax.inference.sampling import make_sampling
from llava_mini_jax.models import llava_mini
from llava_mini_jax.models.llava_mini import Inputs, LlavaMiniConfig
from llava_mini_jax.params import ParamSpec, Tree
from llava_mini_jax.weights.quantize import is_product

DTYPES = ("float32", "bfloat16", "int8")  # of weights


def weight_bytes(cfg: LlavaMiniConfig, dtype: str) -> dict[str, int]:
    """Bytes of the weights by component; with "int8" one byte a weight of a matrix product, while
    everything else is in the dtype of computing.

    int8's scales, one a channel, are not counted: less than 0.1 %.
    """
    spec = llava_mini.unrolled(llava_mini.spec(cfg))
    found = {}
    for field in dataclasses.fields(spec):
        leaves = param_tree.paths(getattr(spec, field.name))
        found[field.name] = sum(_leaf_bytes(path, s, dtype, cfg) for path, s in leaves.items())
    return found


def _leaf_bytes(path: str, spec: ParamSpec, dtype: str, cfg: LlavaMiniConfig) -> int:
    kept = dtype == "int8" and not is_product(path, spec)
    return math.prod(spec.shape) * _itemsize(cfg.compute_dtype if kept else dtype)


def _itemsize(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize


def cache_bytes_per_token(cfg: LlavaMiniConfig, dtype: str = "bfloat16") -> int:
    """Keys and values of one position in all layers."""
    llm = cfg.llm
    return 2 * llm.layers * llm.kv_heads * llm.head_width * _itemsize(dtype)


def cache_bytes_per_image(cfg: LlavaMiniConfig, parts: int, dtype: str = "bfloat16") -> int:
    """Keys and values of a picture's or frame's visual tokens."""
    return cache_bytes_per_token(cfg, dtype) * cfg.tokens_per_image(parts)


@dataclasses.dataclass(frozen=True)
class Program:
    """Bytes while a compiled program runs; one runs at a time."""

    weights: int  # of the whole model, which stays, read by this program or not
    inputs: int
    outputs: int  # what takes a donated input's place is not in it
    temporaries: int

    @property
    def total(self) -> int:
        return self.weights + self.inputs + self.outputs + self.temporaries


def compiled_programs(cfg: LlavaMiniConfig, request: Request, dtype: Any) -> dict[str, Program]:
    """What the compiler plans for each program of a request; nothing is allocated.

    CPUs compute bfloat16 products in float32 and plan room for it, so there the
    figures to compare with are float32's. Raises InputError for compression inside the LLM.
    """
    generate.refuse_inside(cfg)
    spec = llava_mini.unrolled(llava_mini.spec(cfg))
    params = param_tree.abstract(spec, dtype)
    chunk = next((n for n in generate.FRAME_CHUNKS if n >= request.images), None)
    chunk = chunk or generate.FRAME_CHUNKS[-1]
    pixels, seen, text, inputs = _arguments(cfg, request, chunk)
    number = jax.ShapeDtypeStruct((chunk,), jnp.int32)
    images = jax.ShapeDtypeStruct((1,), jnp.int32)
    room = request.new_tokens + 1
    see = (params, seen, pixels, number, number, text, inputs.fuse_BT, cfg)
    begin = (params, seen, images, text, inputs, cfg, room)
    state = jax.eval_shape(lambda *args: generate.prefill(*args, cfg, room), *begin[:5])
    limit = jax.ShapeDtypeStruct((), jnp.int32)
    sampling = jax.eval_shape(lambda: make_sampling(1, 0.0, 1.0, 0, 0, ()))
    programs = {
        "see a chunk of pictures": (generate.encode_frames.lower(*see), see[1:-1]),
        "read the prompt": (generate.prefill.lower(*begin), begin[1:5]),
        "decode": (generate.decode.lower(params, state, sampling, limit, cfg), state),
    }
    weights = _bytes(params)
    return {
        name: _program(lowered.compile(), weights, _bytes(inputs))
        for name, (lowered, inputs) in programs.items()
    }


def _program(compiled: Any, weights: int, inputs: int) -> Program:
    plan = compiled.memory_analysis()
    return Program(
        weights=weights,
        inputs=inputs,
        outputs=plan.output_size_in_bytes - plan.alias_size_in_bytes,
        temporaries=plan.temp_size_in_bytes,
    )


def _bytes(tree: Tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _arguments(
    cfg: LlavaMiniConfig, request: Request, chunk: int
) -> tuple[Tree, generate.Encoded, Tree, Inputs]:
    """(pixels of a chunk, what is seen, text, inputs without pixels) as abstract arrays."""

    def array(*sizes: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype)

    T, D, side = request.text + 1, cfg.llm.width, cfg.vision.image_size
    visual = request.images * cfg.tokens_per_image(request.parts)
    seen = generate.Encoded(
        visual_BVD=array(1, visual, D, dtype=cfg.dtype),
        fused_BTD=array(1, T, D, dtype=jnp.float32),
    )
    inputs = Inputs(
        ids_BT=array(1, T),
        fuse_BT=array(1, T, dtype=jnp.bool_),
        pixels_BIJYXC=array(1, 0, request.parts, side, side, 3, dtype=jnp.uint8),
        frames_BI=array(1, 0, dtype=jnp.bool_),
        slots_BS=array(1, request.text + visual),
    )
    pixels = array(chunk, request.parts, side, side, 3, dtype=jnp.uint8)
    return pixels, seen, array(1, T, D, dtype=cfg.dtype), inputs


def allocator_peak() -> int | None:
    """Bytes that the first device's allocator has given out at most; None on CPUs."""
    stats = jax.local_devices()[0].memory_stats()
    return None if not stats else stats.get("peak_bytes_in_use")
