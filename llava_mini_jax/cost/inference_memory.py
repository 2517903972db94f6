"""Memory of inference: weights, keys and values of an image or frame, and the peak of a request.

    config --spec--> bytes of every component's weights, in float32, bfloat16, int8 and int4
           --shape of the cache--> bytes a token, an image, a frame
           --compile abstract programs--> what each takes; nothing is allocated
           --run, on an accelerator--> what its allocator says

Training's memory is in training/step_memory.py.
"""

import dataclasses

import jax
import jax.numpy as jnp

from llava_mini_jax import sharding
from llava_mini_jax.cost import network, programs
from llava_mini_jax.cost.device_memory import tree_bytes
from llava_mini_jax.cost.latency import CHUNK, Request
from llava_mini_jax.inference import blocks
from llava_mini_jax.inference.seeing import sizes_up_to
from llava_mini_jax.models import cache
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig

DTYPES = ("float32", "bfloat16", "int8", "int4")  # of weights


def weight_bytes(cfg: LlavaMiniConfig, dtype: str) -> dict[str, int]:
    """Bytes of the weights by component, as they are loaded in `dtype`, scales included."""
    whole = programs.weights(cfg, dtype)
    return {f.name: tree_bytes(getattr(whole, f.name)) for f in dataclasses.fields(LlavaMini)}


def cache_bytes_per_token(cfg: LlavaMiniConfig, dtype: str = "bfloat16") -> int:
    """Keys and values of one position in all layers."""
    return cfg.llm.layers * network.layer(cfg.llm).keys_values(1) * jnp.dtype(dtype).itemsize


def cache_bytes_per_image(cfg: LlavaMiniConfig, parts: int, dtype: str = "bfloat16") -> int:
    """Keys and values of an image's or frame's visual tokens, of those that stay."""
    if cfg.declared.keeps is not None:
        each = network.layer(cfg.llm).keys_values(1) * jnp.dtype(dtype).itemsize
        return sum(cache.kept(cfg)) * each
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


def compiled_programs(cfg: LlavaMiniConfig, request: Request, dtype: str) -> dict[str, Program]:
    """What the compiler plans for each program of a request; nothing is allocated.

    CPUs compute bfloat16 products in float32 and plan room for it, so there the
    figures to compare with are float32's. Raises InputError for compression inside the LLM.
    """
    positions = request.text + request.images * cfg.tokens_per_image(request.parts)
    length = positions + request.new_tokens + 1
    first, *later = blocks.sizes_of(positions, length)
    sizes = programs.Sizes(
        rows=1,
        length=request.text + 1,
        images=next(n for n in sizes_up_to(CHUNK) if n >= min(CHUNK, request.images)),
        parts=request.parts,
        slots=length,
    )
    calls = {"encode a chunk of images": ("encode_vision", sizes)}
    calls["what patches give"] = ("prefuse_images", sizes)
    if cfg.prefusion_layers:
        calls["fuse the text with them"] = ("prefuse_text", sizes)
    calls["read the prompt"] = ("read_fresh", dataclasses.replace(sizes, length=first))
    if later:
        calls["read more of it"] = ("read_block", dataclasses.replace(sizes, length=max(later)))
    calls["decode"] = ("decode", sizes)
    weights, found = tree_bytes(programs.weights(cfg, dtype)), {}
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        for name, (program, own) in calls.items():
            function, given, static = programs.call(program, cfg, dtype, own)
            plan = function.lower(*given, **static).compile().memory_analysis()
            outputs = plan.output_size_in_bytes - plan.alias_size_in_bytes
            found[name] = Program(weights, tree_bytes(given[1:]), outputs, plan.temp_size_in_bytes)
    return found


def allocator_peak() -> int | None:
    """Bytes that the first device's allocator has given out at most; None on CPUs."""
    stats = jax.local_devices()[0].memory_stats()
    return None if not stats else stats.get("peak_bytes_in_use")
