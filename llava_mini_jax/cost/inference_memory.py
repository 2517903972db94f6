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
from llava_mini_jax.cost import network
from llava_mini_jax.cost.device_memory import tree_bytes
from llava_mini_jax.cost.latency import Request
from llava_mini_jax.inference import generate
from llava_mini_jax.inference.sampling import make_sampling
from llava_mini_jax.models import llava_mini
from llava_mini_jax.models.llava_mini import Inputs, LlavaMini, LlavaMiniConfig
from llava_mini_jax.weights.quantize import is_product

DTYPES = ("float32", "bfloat16", "int8")  # of weights


def weight_bytes(cfg: LlavaMiniConfig, dtype: str) -> dict[str, int]:
    """Bytes of the weights by component; with "int8" one byte a weight of a matrix product, while
    everything else is in the dtype of computing.

    int8's scales, one a channel, are not counted: less than 0.1 %.
    """
    found = {field.name: 0 for field in dataclasses.fields(LlavaMini)}
    for path, spec in param_tree.paths(llava_mini.spec(cfg)).items():
        kept = dtype == "int8" and not is_product(path, spec)
        itemsize = jnp.dtype(cfg.compute_dtype if kept else dtype).itemsize
        found[path.split("/")[0]] += math.prod(spec.shape) * itemsize
    return found


def cache_bytes_per_token(cfg: LlavaMiniConfig, dtype: str = "bfloat16") -> int:
    """Keys and values of one position in all layers."""
    return cfg.llm.layers * network.layer(cfg.llm).keys_values(1) * jnp.dtype(dtype).itemsize


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
    pixels, seen, text, inputs = _arguments(cfg, request, chunk or generate.FRAME_CHUNKS[-1])
    number = jax.ShapeDtypeStruct(pixels.shape[:1], jnp.int32)
    images, limit = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1,), ()))
    room = request.new_tokens + 1
    see = (params, seen, pixels, number, number, text, cfg)
    begin = (params, seen, images, text, inputs, cfg, room)
    state = jax.eval_shape(lambda *args: generate.prefill(*args, cfg, room), *begin[:5])
    sampling = jax.eval_shape(lambda: make_sampling(1, 0.0, 1.0, 0, 0, ()))
    programs = {
        "see a chunk of pictures": (generate.encode_frames.lower(*see), see[1:-1]),
        "read the prompt": (generate.prefill.lower(*begin), begin[1:5]),
        "decode": (generate.decode.lower(params, state, sampling, limit, cfg), state),
    }
    weights, found = tree_bytes(params), {}
    for name, (lowered, given) in programs.items():
        plan = lowered.compile().memory_analysis()
        outputs = plan.output_size_in_bytes - plan.alias_size_in_bytes
        found[name] = Program(weights, tree_bytes(given), outputs, plan.temp_size_in_bytes)
    return found


def _arguments(
    cfg: LlavaMiniConfig, request: Request, chunk: int
) -> tuple[Any, generate.Encoded, Any, Inputs]:
    """(pixels of a chunk, what is seen, text, inputs without pixels) as abstract arrays."""
    T, visual = request.text + 1, request.images * cfg.tokens_per_image(request.parts)
    shape = network.Shape(
        rows=1, images=0, parts=request.parts, text=T, sequence=request.text + visual, logits=1
    )
    chunks = network.inputs(cfg, dataclasses.replace(shape, images=chunk))
    pixels = jax.ShapeDtypeStruct(chunks.pixels_BIJYXC.shape[1:], jnp.uint8)

    def hidden(positions: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((1, positions, cfg.llm.width), dtype)

    seen = generate.Encoded(hidden(visual, cfg.dtype), hidden(T, jnp.float32))
    return pixels, seen, hidden(T, cfg.dtype), network.inputs(cfg, shape)


def allocator_peak() -> int | None:
    """Bytes that the first device's allocator has given out at most; None on CPUs."""
    stats = jax.local_devices()[0].memory_stats()
    return None if not stats else stats.get("peak_bytes_in_use")
