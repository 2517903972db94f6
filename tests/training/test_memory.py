"""The memory that `estimate` works out is what XLA reports of the compiled step, on CPU.

Nothing is run: the step is compiled for abstract arrays of a model whose terms have the proportions
of a real one (a layer's weights, its activations, attention scores, logits and moments all count).
In float32: XLA's CPU compiler turns bfloat16 arrays into float32 copies that accelerators lack.
"""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from configs import paper
from llava_mini_jax import params as param_tree
from llava_mini_jax import sharding
from llava_mini_jax.config import CLIP_L_336, VICUNA_7B
from llava_mini_jax.data.batches.examples import TrainBatch
from llava_mini_jax.models import llava_mini
from llava_mini_jax.models.llava_mini import Inputs
from llava_mini_jax.sharding import MeshConfig
from llava_mini_jax.training.dry_run import describe, plan
from llava_mini_jax.training.optimizer import make_optimizer
from llava_mini_jax.training.stages import TrainConfig
from llava_mini_jax.training.step import init_state, train_step
from llava_mini_jax.training.step_memory import estimate, groups

# The compiler's schedule and what it fuses are not modelled.
RTOL = 0.15

LLM = dataclasses.replace(
    VICUNA_7B,
    vocab_size=8192,
    width=512,
    mlp_width=1376,
    layers=6,
    heads=8,
    kv_heads=8,
    head_width=64,
)
VISION = dataclasses.replace(
    CLIP_L_336, image_size=168, width=256, mlp_width=1024, layers=4, heads=4
)
ONE = MeshConfig()


def stage(
    number: int = 2,
    *,
    remat: str = "full",
    length: int = 256,
    mesh: MeshConfig = ONE,
    **changes: Any,
) -> TrainConfig:
    of_paper = paper.stage_1(LLM, "") if number == 1 else paper.stage_2(LLM, "vicuna_v1", "")
    model = of_paper.model
    model = dataclasses.replace(
        model,
        vision=VISION,
        projector=dataclasses.replace(model.projector, in_width=VISION.width),
        compute_dtype="float32",
        remat=remat,
    )
    images = dataclasses.replace(of_paper.images, size=VISION.image_size)
    settings = dict(batch_size=8, accumulate=1, loss_chunk=0, lengths=(length,), mesh=mesh)
    settings["prompt"] = dataclasses.replace(of_paper.prompt, max_length=length)
    return dataclasses.replace(of_paper, model=model, images=images, **(settings | changes))


# What dominates is said by the phase of the peak.
CASES = {
    "stage 1": (stage(1), "language model"),
    "stage 1, nothing recomputed": (stage(1, remat="none"), "loss"),
    "stage 1, a long row": (stage(1, length=1024, batch_size=1), "language model"),
    "long rows": (stage(length=1024, batch_size=2), "fusion"),
    "few rows": (stage(batch_size=2), "update"),
    "micro-batches": (stage(accumulate=4), "fusion"),
    "a bfloat16 moment": (
        stage(
            batch_size=2,
            optimizer=dataclasses.replace(paper.adam(1e-4), first_moment_dtype="bfloat16"),
        ),
        "update",
    ),
    "nothing recomputed": (stage(remat="none"), "loss"),
    "all but products recomputed": (stage(remat="matmuls"), "language model"),
    "all but attention recomputed": (stage(remat="attention"), "language model"),
    "chunks of the loss": (stage(loss_chunk=64, batch_size=16), "fusion"),
    "fsdp": (stage(mesh=MeshConfig(fsdp=8), batch_size=16), "fusion"),
    "fsdp, micro-batches": (
        stage(mesh=MeshConfig(fsdp=8), batch_size=32, accumulate=2, loss_chunk=64),
        "fusion",
    ),
    "fsdp and tensor": (
        stage(mesh=MeshConfig(fsdp=4, tensor=2), batch_size=16),
        "language model",
    ),
    "tensor": (stage(mesh=MeshConfig(tensor=8), batch_size=4), "language model"),
}
QUICK = {"stage 1", "stage 1, nothing recomputed"}


def batch(stage: TrainConfig, images: int) -> TrainBatch:
    B, S, side = stage.batch_size, stage.lengths[-1], VISION.image_size

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        spec = sharding.partition(shape, ("batch", *(None,) * (len(shape) - 1)))
        mesh = jax.sharding.get_abstract_mesh()
        placed = None if spec is None else jax.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    inputs = Inputs(
        ids_BT=array((B, S), jnp.int32),
        fuse_BF=array((B, S), jnp.int32),
        pixels_BIJYXC=array((B, images, 1, side, side, 3), jnp.uint8),
        frames_BI=array((B, images), jnp.bool_),
        slots_BS=array((B, S), jnp.int32),
        padding_side="right",
    )
    return TrainBatch(inputs, array((B, S), jnp.int32))


def compiled_bytes(stage: TrainConfig, images: int = 1) -> int:
    """Bytes on one device that XLA reports of the compiled step."""
    sizes = dataclasses.asdict(stage.mesh)
    devices = jax.set_mesh(sharding.make_mesh(**sizes)) if stage.mesh != ONE else None
    with devices or contextlib.nullcontext():
        params = param_tree.abstract(llava_mini.spec(stage.model), stage.param_dtype)
        chosen, _ = param_tree.split(params, lambda p: param_tree.matches(p, stage.trainable))
        optimizer = make_optimizer(stage.optimizer, stage.steps, chosen)
        start = functools.partial(init_state, trainable=stage.trainable, optimizer=optimizer)
        lowered = train_step.lower(
            jax.eval_shape(start, params),
            batch(stage, images),
            cfg=stage.model,
            optimizer=optimizer,
            accumulate=stage.accumulate,
            loss_chunk=stage.loss_chunk,
        )
        # Machine code is not needed; which arrays there are does not depend on it.
        found = lowered.compile({"xla_backend_optimization_level": 0}).memory_analysis()
    arguments, outputs = found.argument_size_in_bytes, found.output_size_in_bytes
    return arguments + found.temp_size_in_bytes + outputs - found.alias_size_in_bytes


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CASES],
)
def test_the_estimate_is_what_the_compiler_reports(name: str) -> None:
    case, peak = CASES[name]
    found = estimate(case)
    assert found.peak == peak
    assert found.total == pytest.approx(compiled_bytes(case), rel=RTOL)


@pytest.mark.slow
def test_the_estimate_of_a_short_video() -> None:
    case = stage(batch_size=2)
    assert estimate(case, 8).total == pytest.approx(compiled_bytes(case, 8), rel=RTOL)


@pytest.mark.slow
def test_more_frames_add_their_pixels_alone() -> None:
    """A few frames are computed at a time, whatever their number.

    What these few take is compared with the compilers of GPUs and TPUs in test_memory_of_compilers:
    CPU's merges layers that are to be recomputed with those of the forward pass, and keeps both.
    """
    case = stage(batch_size=2)
    more = estimate(case, 32).total - estimate(case, 16).total
    found = compiled_bytes(case, 32) - compiled_bytes(case, 16)
    assert more == pytest.approx(found, rel=RTOL)


def test_the_state_of_vicuna_7b_is_twelve_bytes_a_trained_parameter() -> None:
    given = dataclasses.replace(paper.stage_2(VICUNA_7B, "vicuna_v1", ""), mesh=MeshConfig(fsdp=8))
    found = groups(estimate(given))
    trained, frozen = 7_568_932_864, 303_507_456
    # Norms and biases, which are whole on every device, are the hundredth more.
    # The frozen tower is whole, too.
    assert found["parameters"] == pytest.approx(4 * (trained / 8 + frozen), rel=0.01)
    assert found["optimiser state"] == pytest.approx(trained * 8 / 8, rel=0.01)


def test_second_moments_are_counted_as_float32() -> None:
    half = dataclasses.replace(paper.adam(1e-4), first_moment_dtype="bfloat16")
    given = stage(param_dtype="bfloat16", optimizer=half)
    whole, found = estimate(stage()).always, estimate(given).always
    assert found["second moments"] == whole["second moments"]
    for name in ("trained parameters", "first moments"):
        assert found[name] == whole[name] / 2


def test_what_is_kept_falls_from_policy_to_policy_and_the_frozen_tower_keeps_nothing() -> None:
    names = "kept before the language model", "kept of its layers"
    kept = {}
    for remat in ("none", "matmuls", "attention", "full"):
        phase = estimate(stage(remat=remat)).phases["loss"]
        kept[remat] = sum(phase[name] for name in names)
    assert kept["none"] > 2 * kept["matmuls"] > 2 * kept["attention"] > 2 * kept["full"]
    deep = dataclasses.replace(VISION, layers=12)
    deeper = dataclasses.replace(stage(), model=dataclasses.replace(stage().model, vision=deep))
    assert estimate(deeper).phases["loss"] == estimate(stage()).phases["loss"]


def test_a_plan_takes_as_few_micro_batches_as_fit() -> None:
    given = dataclasses.replace(paper.stage_2(VICUNA_7B, "vicuna_v1", ""), lengths=(256,))
    few, memory = plan(given, MeshConfig(fsdp=8), 80)
    assert (few.accumulate, few.mesh.fsdp) == (1, 8) and memory.total < 80 * 2**30
    more, memory = plan(given, MeshConfig(fsdp=8), 30)
    assert more.accumulate == 4 and memory.total < 30 * 2**30
    none, memory = plan(given, MeshConfig(fsdp=8), 16)
    assert none.accumulate == 32 and memory.total > 16 * 2**30


def test_a_dry_run_prints_every_term_the_devices_and_where_parameters_lie(capsys) -> None:
    given = stage(mesh=MeshConfig(fsdp=8), batch_size=16)
    describe([given])
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    printed = {row[0]: row[1] for row in cells if len(row) == 2}
    found = estimate(given)
    for name, size in found.terms.items():
        assert printed[name] == f"{size / 2**30:,.2f} GiB"
    assert printed["at the peak (fusion)"] == f"{found.total / 2**30:,.2f} GiB"
    assert printed["TPU v5e"] == "fits"
    (table,) = (line.split() for line in lines if line.split()[:1] == ["llm/embed_tokens"])
    assert table[-3:] == ["-", "fsdp", f"{8192 * 512 * 4 // 8:,}"]
