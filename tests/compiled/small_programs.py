"""Programs of two layers for chips that are not here, and what each of them must not do.

    chip --all_of--> name of a program, complaints (compiled when they are asked for)

A stack of layers is a loop, so that two say what thirty-two would. A training step's width is a
quarter of the real one, which libtpu compiles in half the time, and treats alike.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from configs import paper
from llava_mini_jax import config as configs
from llava_mini_jax import params as param_tree
from llava_mini_jax import sharding
from llava_mini_jax.cost import programs, topology
from llava_mini_jax.cost.compiled import Reading, read
from llava_mini_jax.cost.flops import step_flops
from llava_mini_jax.ops.attention import attention
from llava_mini_jax.ops.einsum import einsum
from llava_mini_jax.ops.masks import Mask
from llava_mini_jax.params import ParamSpec, zeros
from llava_mini_jax.sharding import MeshConfig
from llava_mini_jax.training import step_program
from llava_mini_jax.training.stages import TrainConfig
from llava_mini_jax.training.step_memory import estimate
from tests.compiled import checks

ROWS = 16  # answered together
LENGTH, SLOTS, BLOCK, MICRO_BATCHES, DEVICES = 512, 12_288, 128, 2, 4
IMAGE = configs.CLIP_L_336.grid**2  # positions of an image in pre-fusion
TOWER = IMAGE + 1
SLICES = {"v5e": ("1x1", "2x2"), "h100": ("1", "4")}
# Slices of two torus axes, on which libtpu does not scatter gradients by itself.
TORI = {"v5e": ("4x4", "8x8"), "h100": ()}
KERNEL = {"v5e": "splash", "h100": "cudnn"}
# (rows, queries, keys, heads, key heads, head width, slot of the first query, trained): text behind
# an image with grouped heads; the frozen tower, whose length nothing divides.
ATTENTION = {
    "of text behind an image": (2, LENGTH, IMAGE + LENGTH, 32, 8, 128, IMAGE, True),
    "of the tower": (8, TOWER, TOWER, 16, 16, 64, None, False),
}

Complaints = Iterable[str]


def compiled(mesh: MeshConfig, devices: list[Any], trace: Callable[[], Any]) -> Reading:
    sizes = dataclasses.asdict(mesh)
    with jax.set_mesh(sharding.make_mesh(**sizes, devices=devices)):
        return read(trace().lower().compile())


# --------------------------------------------------------------------------------------- programs


def attention_alone(sizes: tuple) -> Any:
    """Forward, and backward if it is trained, through the dispatcher; traced."""
    B, T, S, N, K, H, first, trained = sizes
    mesh = jax.sharding.get_mesh()
    whole = jax.NamedSharding(mesh, jax.P())

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=whole)

    def forward(*given: jax.Array) -> jax.Array:
        return attention(*given, Mask(first=first))

    def both(*given: jax.Array) -> Any:
        out, back = jax.vjp(forward, *given)
        return out, back(out)

    return jax.jit(both if trained else forward).trace(
        array(B, T, N, H), array(B, K, S, H), array(B, K, S, H)
    )


def gathered_product(rows: int, outputs: int, inputs: int) -> Any:
    """A product with a weight that lies in pieces, and its gradient; traced."""
    x = param_tree.abstract(ParamSpec((rows, inputs), ("batch", None), zeros), jnp.bfloat16)
    spec = ParamSpec((outputs, inputs), (None, "embed"), zeros)
    weight = param_tree.abstract(spec, jnp.bfloat16)

    def loss(weight: jax.Array, x: jax.Array) -> jax.Array:
        y = einsum("BI,OI->BO", x, weight, ("batch", None))
        return jnp.square(y.astype(jnp.float32)).sum()

    return jax.jit(jax.grad(loss)).trace(weight, x)


def stage() -> TrainConfig:
    """Stage 2 of the paper around two layers like Vicuna-7B's."""
    sizes = dict(width=1024, mlp_width=2816, heads=8, kv_heads=8, layers=2)
    llm = dataclasses.replace(configs.VICUNA_7B, **sizes)
    parent = paper.stage_2(llm, "vicuna_v1", "")
    return dataclasses.replace(
        parent,
        mesh=MeshConfig(fsdp=DEVICES),
        lengths=(LENGTH,),
        prompt=dataclasses.replace(parent.prompt, max_length=LENGTH),
        accumulate=MICRO_BATCHES,
        batch_size=8 * MICRO_BATCHES * DEVICES,
    )


def answers() -> tuple[configs.LlavaMiniConfig, programs.Sizes]:
    llm = dataclasses.replace(configs.LLAMA_3_1_8B, layers=2)
    sizes = programs.Sizes(rows=1, length=BLOCK, images=1, parts=1, slots=SLOTS)
    return configs.build(llm, configs.CLIP_L_336, "release"), sizes


# ----------------------------------------------------------------------------------------- checks


def of_attention(name: str, chip: str, devices: list[Any]) -> Complaints:
    sizes = ATTENTION[name]
    found = compiled(MeshConfig(), devices, lambda: attention_alone(sizes))
    yield from checks.unfused(found, KERNEL[chip])
    yield from checks.written_scores(found, [sizes[1:3]])


def of_training(chip: str, devices: list[Any]) -> Complaints:
    given = stage()
    shape = step_program.shape_of(given, 1)
    found = compiled(given.mesh, devices, lambda: step_program.traced_step(given, shape))
    cfg, llm = given.model, given.model.llm
    pairs = [(LENGTH, LENGTH), (LENGTH, IMAGE + LENGTH), (IMAGE, IMAGE), (TOWER, TOWER)]
    yield from checks.unfused(found, KERNEL[chip])
    yield from checks.written_scores(found, pairs)
    yield from checks.gathered_heads(found, llm.vocab_size * llm.width, MICRO_BATCHES)
    yield from checks.windowed_products(found)
    yield from checks.reduced_whole(found, llm.width * llm.width)
    model = step_flops(cfg, given.trainable, shape)
    yield from checks.too_many_products(found, model / DEVICES)
    yield from checks.wrong_estimate(found, estimate(given).total)


def of_gradients(shape: str, chip: str) -> Complaints:
    devices = topology.absent_devices(chip, shape)
    outputs, inputs = 11_008, 4096  # of Vicuna-7B's MLP
    trace = lambda: gathered_product(len(devices), outputs, inputs)  # noqa: E731
    found = compiled(MeshConfig(fsdp=len(devices)), devices, trace)
    yield from checks.reduced_whole(found, inputs * inputs)
    if "reduce-scatter" not in found.collectives():
        yield "no gradient is scattered"


def of_answers(
    name: str, chip: str, devices: list[Any], rows: int = 1, slots: int = SLOTS
) -> Complaints:
    cfg, sizes = answers()
    sizes = dataclasses.replace(sizes, rows=rows, slots=slots)

    def trace() -> Any:
        function, arguments, static = programs.call(name, cfg, "bfloat16", sizes)
        return function.trace(*arguments, **static)

    found = compiled(MeshConfig(), devices, trace)
    layer = rows * slots * cfg.llm.kv_heads * cfg.llm.head_width * cfg.dtype.itemsize
    # Of the whole model: what a call needs beside the cache does not grow with its layers.
    cache = 2 * configs.LLAMA_3_1_8B.layers * layer
    yield from checks.temporaries_beside_cache(found, cache)
    yield from checks.copies_of_cache(found, layer)
    if name == "read_block":
        yield from checks.unfused(found, KERNEL[chip])
        yield from checks.written_scores(found, [(BLOCK, slots)])


def all_of(chip: str) -> Iterator[tuple[str, Complaints]]:
    one, several = (topology.absent_devices(chip, shape) for shape in SLICES[chip])
    for name in ATTENTION:
        yield f"attention {name}", of_attention(name, chip, one)
    for name in ("decode", "read_block"):
        yield f"{name}, {SLOTS} positions", of_answers(name, chip, one)
        yield f"{name}, {ROWS} slots", of_answers(name, chip, one, ROWS, 2048)
    for shape in TORI[chip]:
        yield f"gradients on {shape}", of_gradients(shape, chip)
    yield f"a training step on {DEVICES}", of_training(chip, several)
