"""What `llava-mini profile compile` compiles: a run's training step, a model's programs.

    words of the command --> Machine, Jobs --compiled--> Result --> profile_compiled.py

Imported only when something is compiled: unlike the command's options, it needs JAX.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from llava_mini_jax import config as configs
from llava_mini_jax import sharding
from llava_mini_jax.config import Bundle
from llava_mini_jax.cost import chips, programs, topology
from llava_mini_jax.cost import compiled as reading
from llava_mini_jax.cost.baseline import llava_1_5
from llava_mini_jax.cost.chips import Chip
from llava_mini_jax.cost.compiled import Reading, Times
from llava_mini_jax.cost.flops import step_flops
from llava_mini_jax.errors import InputError
from llava_mini_jax.sharding import MeshConfig
from llava_mini_jax.training import step_program
from llava_mini_jax.training.stages import TrainConfig, check, load_config, stages_of
from llava_mini_jax.training.step_memory import estimate
from llava_mini_jax.weights import folders, hub

WITH_CACHE = ("decode", "read_fresh", "read_block")
SLOTS, LENGTH = 640, 128


@dataclasses.dataclass(frozen=True)
class Machine:
    """A slice of chips that are not here."""

    name: str
    chip: Chip
    shape: str
    devices: list[Any]

    def mesh(self, given: str | None, default: MeshConfig) -> MeshConfig:
        """The one that is asked for; it must have every device."""
        mesh = MeshConfig.parse(given) if given else default
        if mesh.devices != len(self.devices):
            raise InputError(
                f"the mesh {mesh} has {mesh.devices} devices, but --slice {self.shape} of"
                f" {self.name} has {len(self.devices)}: give --mesh and --slice as many"
            )
        return mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    name: str
    about: str  # sizes, in words
    mesh: MeshConfig
    trace: Callable[[], Any]  # with the mesh set
    model_flops: float = 0  # of all devices, without recomputation; 0: not known
    estimate: int = 0  # bytes of a device, as --dry-run says
    cache: float = 0  # bytes of one layer's keys on a device; 0: the program has no cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    job: Job
    machine: Machine
    seconds: float  # of the compiler
    reading: Reading
    times: Times


def machine(name: str, shape: str | None) -> Machine:
    chip = chips.chip(name)
    shape = shape or chip.slices[0]
    return Machine(name, chip, shape, topology.absent_devices(name, shape))


# ------------------------------------------------------------------------------------------- jobs


def training_step(args: argparse.Namespace, machine: Machine) -> Job:
    stage = changed(_stage(args.what, args.stage), args)
    count = len(machine.devices)
    default = stage.mesh if stage.mesh.devices == count else MeshConfig(fsdp=count)
    stage = dataclasses.replace(stage, mesh=machine.mesh(args.mesh, default))
    check(stage)
    shape = step_program.shape_of(stage, args.images, args.fused)
    frames = f" with {args.images} frames each" if args.images > 1 else ""
    fused = f", {args.fused} of them fused" if args.fused else ""
    return Job(
        name=f"{Path(args.what).stem}, a training step",
        about=f"{shape.rows} rows of {shape.sequence} positions{frames}{fused}, accumulate"
        f" {stage.accumulate}, remat {stage.model.remat}, {stage.model.llm.layers} layers",
        mesh=stage.mesh,
        trace=lambda: step_program.traced_step(stage, shape),
        model_flops=step_flops(stage.model, stage.trainable, shape, stage.lora),
        estimate=estimate(stage, args.images).total,
    )


def _stage(path: str, name: str | None) -> TrainConfig:
    stages = {stage.name: stage for stage in stages_of(load_config(path))}
    if name is None and len(stages) == 1:
        return next(iter(stages.values()))
    if name not in stages:
        given = f'no stage "{name}"' if name else "several stages"
        raise InputError(f"{path} has {given}; give --stage {', '.join(stages)}")
    return stages[name]


def changed(stage: TrainConfig, args: argparse.Namespace) -> TrainConfig:
    """The stage with the sizes that the command was given."""
    model, length = stage.model, args.length or stage.lengths[-1]
    if args.layers:
        model = dataclasses.replace(model, llm=dataclasses.replace(model.llm, layers=args.layers))
    for field in ("remat", "attention"):
        if getattr(args, field):
            model = dataclasses.replace(model, **{field: getattr(args, field)})
    return dataclasses.replace(
        stage,
        model=model,
        lengths=(length,),
        prompt=dataclasses.replace(stage.prompt, max_length=length),
        accumulate=args.accumulate or stage.accumulate,
        batch_size=args.rows or stage.batch_size,
        param_dtype=args.dtype or stage.param_dtype,
    )


def answers(args: argparse.Namespace, machine: Machine) -> list[Job]:
    for name in args.program or ():
        if name not in programs.NAMES:
            raise InputError(
                f'program "{name}" is unknown; give one or more of {", ".join(programs.NAMES)}'
            )
    bundle, dtype = _bundle(args.what), args.dtype or "bfloat16"
    if dtype not in configs.ASKING_DTYPES:
        raise InputError(f'--dtype is "{dtype}"; give one of {", ".join(configs.ASKING_DTYPES)}')
    computing = "bfloat16" if dtype in configs.NARROW_DTYPES else dtype
    cfg = dataclasses.replace(bundle.model, compute_dtype=computing)
    if args.attention:
        cfg = dataclasses.replace(cfg, attention=args.attention)
    if args.layers:
        cfg = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, layers=args.layers))
    if args.baseline:
        cfg = llava_1_5(cfg)
    sizes = programs.Sizes(
        rows=args.rows or 1,
        length=args.length or LENGTH,
        images=args.images,
        parts=bundle.images.parts,
        slots=args.slots or SLOTS,
    )
    mesh = machine.mesh(args.mesh, MeshConfig(tensor=len(machine.devices)))
    llm = cfg.llm
    split = mesh.tensor if llm.kv_heads % mesh.tensor == 0 else 1
    keys = sizes.rows * sizes.slots * llm.kv_heads * llm.head_width * cfg.dtype.itemsize / split

    model = f"LLaVA-1.5 of {args.what}" if args.baseline else args.what

    def job(name: str) -> Job:
        return Job(
            name=f"{model}, {name}",
            about=f"{dtype}, {llm.layers} layers; {_sizes_of(name, sizes)}",
            mesh=mesh,
            trace=lambda: _trace(programs.call(name, cfg, dtype, sizes)),
            cache=keys if name in WITH_CACHE else 0,
        )

    return [job(name) for name in args.program or programs.names(cfg)]


def _sizes_of(name: str, sizes: programs.Sizes) -> str:
    if name == "decode":
        return f"rows {sizes.rows}, slots {sizes.slots}, a token"
    if name == "read_block":
        return f"{sizes.length} positions against {sizes.slots} slots"
    if name == "read_fresh":
        return f"rows {sizes.rows}, positions {sizes.length}"
    return f"frames {sizes.images}, parts {sizes.parts}, text {sizes.length}"


def _trace(call: programs.Call) -> Any:
    function, arguments, static = call
    return function.trace(*arguments, **static)


def _bundle(name: str) -> Bundle:
    """A published shape in the release's dialect, or what a folder says."""
    if name in configs.BACKBONES:
        vision = configs.tower_of(name)
        return Bundle(
            model=configs.build(configs.BACKBONES[name], vision, "release"),
            images=configs.image_config("release", vision),
            prompt=configs.prompt_config("release", "vicuna_v1", LENGTH),
            eos_ids=(),
            pad_id=0,
        )
    return folders.open_model(
        hub.resolve_folder(name), vision_tower=None, compute_dtype="bfloat16"
    )[0]


# -------------------------------------------------------------------------------------- compiling


def compiled(
    job: Job, machine: Machine, options: dict[str, str], folder: str | None = None
) -> Result:
    """The job's program, compiled and read. Raises InputError for what the compiler refuses."""
    if not machine.chip.is_tpu:  # nothing is there to time candidates on
        options = {"xla_gpu_autotune_level": "0"} | options
    sizes = dataclasses.asdict(job.mesh)
    with jax.set_mesh(sharding.make_mesh(**sizes, devices=machine.devices)):
        lowered = job.trace().lower()
        began = time.perf_counter()
        try:
            made = lowered.compile(compiler_options=options or None)
        except (RuntimeError, ValueError) as error:
            said = " ".join(str(error).split())[:300]
            raise InputError(
                f"{job.name} cannot be compiled for {machine.name} ({said}); give smaller sizes,"
                " more devices or other options"
            ) from error
        seconds = time.perf_counter() - began
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        name = f"{job.name}, {machine.name} {machine.shape}".replace("/", "-")
        (Path(folder) / f"{name}.hlo").write_text(made.as_text())
    found = reading.read(made)
    times = reading.times(found, machine.chip)
    return Result(job=job, machine=machine, seconds=seconds, reading=found, times=times)
