"""Stages of training as data: what is trained, from what, on what, and how.

    stage 1 (paper section 4.3)   patches as they are, no pre-fusion; trains the projector
    stage 2                       compressor and pre-fusion added; trains everything but the tower

A config file returns one `TrainConfig`, or a frozen dataclass whose fields are `TrainConfig`s that
run one after the other, each from the parameters that the one before left.
"""

import dataclasses
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import jax

from llava_mini_jax import params as param_tree
from llava_mini_jax import sharding
from llava_mini_jax.config import Bundle, PromptConfig, build
from llava_mini_jax.data.conversation import TEMPLATES
from llava_mini_jax.data.digits import DigitsConfig
from llava_mini_jax.data.images import ImageConfig
from llava_mini_jax.data.sources import SourcesConfig
from llava_mini_jax.errors import InputError
from llava_mini_jax.models import llava_mini
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.training.optimizer import OptimizerConfig

DTYPES = ("float32", "bfloat16", "float16")
STAGE_1 = ("projector/*",)
STAGE_2 = ("projector/*", "compressor/*", "prefusion/*", "llm/*")
EVERYTHING = ("*",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis (sharding.py); 1 x 1 x 1 runs without a mesh."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Data that nothing is learnt from; its loss is measured while a stage runs."""

    data: DigitsConfig | SourcesConfig
    samples: int  # as TrainConfig's
    batches: int  # of the stage's batch size, the same ones each time
    every: int  # steps; the last step is always followed by it


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    name: str  # of the stage: its folder in the workdir
    model: LlavaMiniConfig
    images: ImageConfig
    prompt: PromptConfig
    tokenizer: str  # "digits", or a folder or hub name with tokenizer files
    data: DigitsConfig | SourcesConfig
    samples: int  # of the digits world before they repeat; data sets have as many as they have
    bad_samples: float  # share of the data set's samples that may be broken (data/quarantine.py)
    heldout: HeldOut | None
    start: str  # "fresh", "previous" (the stage before), or a model folder
    fresh: tuple[str, ...]  # path patterns of parameters that this stage initialises anew
    prefusion_init: str  # new pre-fusion layers: "fresh", or a "copy" of the LLM's first layers
    trainable: tuple[str, ...]  # path patterns; everything else is frozen
    optimizer: OptimizerConfig
    steps: int
    batch_size: int  # rows of a step, on all devices and in all micro-batches together
    accumulate: int  # micro-batches of a step, one after the other: memory of batch_size / this
    loss_chunk: int  # positions whose logits exist at a time (training/loss.py); 0: all
    z_loss: float  # weight of the mean squared log-normaliser of the logits; 0: none
    max_skipped: int  # steps in a row without a finite loss and gradient that end the run
    lengths: tuple[int, ...]  # buckets of text and sequence lengths
    scan_layers: bool  # scan over stacked layers (fast compilation), or unrolled (fast on CPU)
    param_dtype: str
    mesh: MeshConfig
    seed: int
    log_every: int
    checkpoint_every: int
    keep: int  # newest checkpoints of a stage that are kept
    keep_every: int  # steps whose checkpoints are kept for ever; 0: none


def load_config(path: str) -> Any:
    """What the function `config()` of a config file returns."""
    if not Path(path).is_file():
        raise InputError(f"config file {path} does not exist; configs/ holds the known ones")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    if not hasattr(module, "config"):
        raise InputError(f"{path} defines no function `config()` that returns the configuration")
    return module.config()


def stages_of(config: Any) -> list[TrainConfig]:
    """The stages that a config file's value holds, in order."""
    if isinstance(config, TrainConfig):
        return [config]
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise InputError(f"a config file must return a TrainConfig, not {type(config).__name__}")
    values = [getattr(config, field.name) for field in dataclasses.fields(config)]
    stages = [value for value in values if isinstance(value, TrainConfig)]
    if not stages:
        raise InputError(f"{type(config).__name__} has no TrainConfig among its fields")
    return stages


def rebuilt(parent: TrainConfig, dialect: str = "paper", **changes: Any) -> TrainConfig:
    """`parent` with another model: `changes` are arguments of `config.build`.

    What the new model lacks (no pre-fusion, no compressor's parameters) is not trained either.
    """
    old = parent.model
    model = build(
        old.llm, old.vision, dialect, remat=old.remat, compute_dtype=old.compute_dtype, **changes
    )
    parts = llava_mini.spec(model)
    has = [pattern for pattern in parent.trainable if getattr(parts, pattern[: -len("/*")])]
    return dataclasses.replace(parent, model=model, trainable=tuple(has))


def check(stage: TrainConfig) -> None:
    """InputError for a stage that cannot be run as it is written."""
    spec = llava_mini.spec(stage.model)
    grouped = (pattern for group in stage.optimizer.groups for pattern in group.patterns)
    for pattern in (*stage.trainable, *stage.fresh, *grouped):
        if not any(param_tree.matches(path, (pattern,)) for path in param_tree.paths(spec)):
            raise InputError(
                f'{stage.name}: the pattern "{pattern}" matches no parameter of this model; '
                "`llava-mini inspect` lists the paths"
            )
    for name, value, known in (
        ("prefusion_init", stage.prefusion_init, ("fresh", "copy")),
        ("images.size", stage.images.size, (stage.model.vision.image_size,)),
        ("prompt.template", stage.prompt.template, tuple(TEMPLATES)),
        ("param_dtype", stage.param_dtype, DTYPES),
        ("model.compute_dtype", stage.model.compute_dtype, DTYPES),
        ("optimizer.first_moment_dtype", stage.optimizer.first_moment_dtype, DTYPES),
    ):
        if value not in known:
            expected = " or ".join(map(str, known))
            raise InputError(f"{stage.name}: {name} is {value!r}; expected {expected}")
    counts = ("samples", "steps", "batch_size", "accumulate", "max_skipped", "log_every")
    for name in (*counts, "checkpoint_every", "keep"):
        if (number := getattr(stage, name)) < 1:
            raise InputError(f"{stage.name}: {name} is {number}; it must be 1 or more")
    if stage.heldout is not None and min(stage.heldout.batches, stage.heldout.every) < 1:
        raise InputError(f"{stage.name}: heldout.batches and heldout.every must be 1 or more")
    for name in ("loss_chunk", "z_loss", "keep_every"):
        if (number := getattr(stage, name)) < 0:
            raise InputError(f"{stage.name}: {name} is {number}; it must be 0 (off) or more")
    for rate in (stage.optimizer.learning_rate, *(g.learning_rate for g in stage.optimizer.groups)):
        if not 0 <= rate < math.inf:
            raise InputError(f"{stage.name}: a learning rate is {rate}; it must be 0 or more")
    if not 0 <= stage.bad_samples <= 1:
        raise InputError(
            f"{stage.name}: bad_samples is {stage.bad_samples}; it is a share, from 0 to 1"
        )
    _check_micro_batches(stage)


def _check_micro_batches(stage: TrainConfig) -> None:
    """Every device must have as many rows of each micro-batch."""
    shards = stage.mesh.data * stage.mesh.fsdp
    if stage.accumulate > 1 and stage.batch_size % (stage.accumulate * shards):
        raise InputError(
            f"{stage.name}: batch_size {stage.batch_size} cannot be divided into accumulate = "
            f"{stage.accumulate} micro-batches over mesh.data x mesh.fsdp = {shards} devices: make "
            f"it a multiple of {stage.accumulate * shards}, or change accumulate"
        )


def starting_params(stage: TrainConfig, previous: LlavaMini | None, key: jax.Array) -> LlavaMini:
    """The parameters that a stage begins with.

    What the previous stage has and `fresh` does not name is taken over; the rest is initialised
    from `key`. Raises InputError where a parameter changed its shape between the stages.
    """
    spec = llava_mini.spec(stage.model)
    if not stage.scan_layers:
        spec = llava_mini.unrolled(spec)
    kept: dict[str, jax.Array] = {}
    if previous is not None:
        kept = param_tree.paths(previous, is_leaf=None)
        kept = {path: leaf for path, leaf in kept.items() if not _is_fresh(path, stage)}
    new = param_tree.split(spec, lambda path: path not in kept)[0]
    made = param_tree.paths(param_tree.init(key, new, stage.param_dtype), is_leaf=None)

    def choose(path: str, leaf: param_tree.ParamSpec) -> jax.Array:
        found = kept.get(path)
        if found is None:
            return made[path]
        if found.shape != leaf.shape:
            raise InputError(
                f"{stage.name}: {path} has shape {found.shape} after the stage before, but "
                f"{leaf.shape} here: name it in `fresh`, or give both stages the same model"
            )
        return sharding.place(found, leaf.axes)  # the stage before may have had another mesh

    params = param_tree.map_paths(choose, spec)
    return _copy_llm_layers(params, made) if stage.prefusion_init == "copy" else params


def _is_fresh(path: str, stage: TrainConfig) -> bool:
    return param_tree.matches(path, stage.fresh)


def _copy_llm_layers(params: LlavaMini, made: dict[str, jax.Array]) -> LlavaMini:
    """New pre-fusion layers as copies of the language model's first ones.

    An option of our own: nobody has said what the authors did (release_facts section 11).
    """
    if params.prefusion is None or not any(path.startswith("prefusion/") for path in made):
        return params
    layers: Any = params.llm.layers
    new = params.prefusion.layers
    if isinstance(new, tuple):
        copied: Any = jax.tree.map(lambda a: a.copy(), layers[: len(new)])
    else:
        copied = jax.tree.map(lambda a, b: a[: len(b)].copy(), layers, new)
    prefusion = dataclasses.replace(params.prefusion, layers=copied)
    return dataclasses.replace(params, prefusion=prefusion)


def bundle_of(stage: TrainConfig, tokenizer: Any) -> Bundle:
    """What an export of this stage's parameters says about itself."""
    eos = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id
    return Bundle(
        model=stage.model,
        images=stage.images,
        prompt=stage.prompt,
        eos_ids=() if eos is None else (int(eos),),
        pad_id=0 if pad is None else int(pad),
    )
