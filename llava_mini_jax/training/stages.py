"""Stages of training as data: what is trained, from what, on what, and how.

    stage 1 (paper section 4.3)   patches as they are, no pre-fusion; trains the projector
    stage 2                       compressor and pre-fusion added; trains everything but the tower

A config file returns one `TrainConfig`, or a frozen dataclass whose fields are `TrainConfig`s that
run one after the other, each from the parameters that the one before left.
"""

import dataclasses
import importlib.util
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_mini_jax import params as param_tree
from llava_mini_jax.config import FLOAT_DTYPES, Bundle, build
from llava_mini_jax.data.digits.pages import DigitsConfig
from llava_mini_jax.data.media.images import ImageConfig
from llava_mini_jax.data.prompt import PromptConfig
from llava_mini_jax.data.sets.packing import NO_PACKING, PackingConfig
from llava_mini_jax.data.sets.sources import SourcesConfig
from llava_mini_jax.data.text.conversation import TEMPLATES
from llava_mini_jax.errors import InputError
from llava_mini_jax.models import llava_mini
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.models.lora import LEARNT, NO_LORA, LoraConfig, with_changes
from llava_mini_jax.ops.rope import DynamicScaling
from llava_mini_jax.sharding import MeshConfig
from llava_mini_jax.training import lora
from llava_mini_jax.training.optimizer import OptimizerConfig

STAGE_1 = ("projector/*",)
STAGE_2 = ("projector/*", "compressor/*", "prefusion/*", "llm/*")
EVERYTHING = ("*",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Validation data, whose loss is measured while a stage runs."""

    data: DigitsConfig | SourcesConfig
    batches: int  # of the stage's batch size, the same ones each time
    every: int  # steps between evaluations; there is always one after the last step


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    name: str  # of the stage, and of its folder in the workdir
    model: LlavaMiniConfig
    images: ImageConfig
    prompt: PromptConfig
    tokenizer: str  # "digits", or a folder or hub name with tokenizer files
    data: DigitsConfig | SourcesConfig
    bad_samples: float  # share of the data's samples that may be broken
    heldout: HeldOut | None  # validation data, which only a config file can add
    start: str  # "fresh", "previous" (the stage before), or a model folder
    fresh: tuple[str, ...]  # path patterns of parameters that this stage initialises
    # New pre-fusion layers: "fresh", a "copy" of the LLM's first ones, or "identity": fresh ones
    prefusion_init: str  # that change nothing until they have learned something
    trainable: tuple[str, ...]  # path patterns of trained parameters; all others are frozen
    optimizer: OptimizerConfig
    steps: int  # optimiser steps
    batch_size: int  # rows of a step, over all devices and micro-batches
    accumulate: int  # micro-batches a step; more need less memory
    loss_chunk: int  # positions whose logits are in memory at a time; 0: all
    z_loss: float  # weight of the mean squared log-normaliser of the logits; 0: none
    max_skipped: int  # the run ends after this many steps in a row without finite loss or gradient
    lengths: tuple[int, ...]  # sequence lengths to compile; a batch uses the shortest that fits
    scan_layers: bool  # scan over stacked layers (compiles fast), or unroll them (fast on CPU)
    param_dtype: str  # of parameters: float32, bfloat16 or float16
    mesh: MeshConfig
    seed: int  # of initial values and of the data's order
    log_every: int  # steps between lines of metrics.jsonl
    checkpoint_every: int  # steps between checkpoints
    keep: int  # how many of the newest checkpoints to keep
    keep_every: int  # steps between checkpoints that are kept forever; 0: none
    lora: LoraConfig = NO_LORA
    # Numbers of vision tokens, one of which each row draws; empty: the model's own, for all rows.
    draw_tokens: tuple[int, ...] = ()
    packing: PackingConfig = NO_PACKING


def load_config(path: str) -> Any:
    """What the function `config()` of a config file returns.

    Config files begin others: they are found beside it as `configs.NAME`, wherever it is started.
    """
    if not Path(path).is_file():
        raise InputError(f"config file {path} does not exist; configs/ holds the known ones")
    # A name of its own: a config called copy.py must not become everybody's module `copy`.
    spec = importlib.util.spec_from_file_location(f"config_file.{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    # The project's folder, of configs/X.py or configs/ablations/X.py; what is installed is first.
    found = map(str, Path(path).resolve().parents[1:3])
    folders = [folder for folder in found if folder not in sys.path]
    sys.path += folders
    try:
        spec.loader.exec_module(module)
        if hasattr(module, "config"):
            return module.config()
    finally:
        for folder in folders:
            sys.path.remove(folder)
    raise InputError(f"{path} defines no function `config()` that returns the configuration")


def stages_of(config: Any) -> list[TrainConfig]:
    """The stages that a config file's value holds, in order."""
    if isinstance(config, TrainConfig):
        return [with_lora(config)]
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise InputError(f"a config file must return a TrainConfig, not {type(config).__name__}")
    values = [getattr(config, field.name) for field in dataclasses.fields(config)]
    stages = [value for value in values if isinstance(value, TrainConfig)]
    if not stages:
        raise InputError(f"{type(config).__name__} has no TrainConfig among its fields")
    return [with_lora(stage) for stage in stages]


def with_lora(stage: TrainConfig) -> TrainConfig:
    """The stage with `trainable` as its `lora` leaves it; InputError where that cannot be."""
    if not stage.lora.rank or set(LEARNT) <= set(stage.trainable):
        return stage
    try:
        trained = lora.trainable_with(stage.lora, stage.model, stage.trainable)
    except InputError as error:
        raise InputError(f"{stage.name}: {error}") from error
    if stage.start == "fresh":
        raise InputError(
            f"{stage.name}: lora adapts an existing model, but start is fresh: name a model folder"
        )
    return dataclasses.replace(stage, trainable=trained)


def rebuilt(parent: TrainConfig, dialect: str = "paper", **changes: Any) -> TrainConfig:
    """`parent` with another model: `changes` are arguments of `config.build`.

    What the new model lacks (no pre-fusion, no compressor's parameters) is not trained either.
    """
    old = parent.model
    model = build(
        old.llm, old.vision, dialect, remat=old.remat, compute_dtype=old.compute_dtype, **changes
    )
    paths = param_tree.paths(llava_mini.spec(model))
    has = [p for p in parent.trainable if any(param_tree.matches(path, (p,)) for path in paths)]
    return dataclasses.replace(parent, model=model, trainable=tuple(has))


def check(stage: TrainConfig) -> None:
    """InputError for a stage that cannot be run as it is written."""
    # In this order: patterns are looked for in a model that can be built, sizes that are numbers.
    rules = (_name, _compressor, _patterns, _choices, _counts, _shares, _lengths, _batch, _packing)
    for rule in rules:
        for mistake in rule(stage):
            raise InputError(f"{stage.name}: {mistake}")


def _name(stage: TrainConfig) -> Iterator[str]:
    if not re.fullmatch(r"\w[\w.-]*", stage.name):
        yield "a stage's name is that of its folder in the workdir: use letters, digits, _ and -"


def _compressor(stage: TrainConfig) -> Iterator[str]:
    kind, declared = stage.model.compressor.kind, stage.model.declared
    if declared.pooled:
        yield (
            f'compressor "{kind}" shares one ratio among the images of a batch, padding among'
            ' them: set its variant to "clean"'
        )
    if stage.images.parts > 1 and not declared.parts:
        yield f'compressor "{kind}" is defined on whole images: set images.grid to 1'
    counts = declared.choice.counts if declared.choice is not None else ()
    if stage.draw_tokens and not counts:
        yield (
            f'draw_tokens is {stage.draw_tokens}, but compressor "{kind}" has one number of tokens:'
            ' leave it out, or use compressor "nested"'
        )
    for number in stage.draw_tokens if counts else ():
        if number not in counts:
            yield (
                f"draw_tokens has {number}, but the model has {', '.join(map(str, counts))} tokens:"
                " draw among these"
            )


def _patterns(stage: TrainConfig) -> Iterator[str]:
    if not stage.trainable:
        yield 'trainable is empty; name what is to be learnt, such as "llm/*"'
    paths = param_tree.paths(spec_of(stage))
    grouped = (pattern for group in stage.optimizer.groups for pattern in group.patterns)
    for pattern in (*stage.trainable, *stage.fresh, *grouped):
        if not any(param_tree.matches(path, (pattern,)) for path in paths):
            yield (
                f'the pattern "{pattern}" matches no parameter of this model; `llava-mini inspect` '
                "lists the paths"
            )


def _choices(stage: TrainConfig) -> Iterator[str]:
    for name, value, known in (
        ("prefusion_init", stage.prefusion_init, ("fresh", "copy", "identity")),
        ("images.size", stage.images.size, (stage.model.vision.image_size,)),
        ("prompt.template", stage.prompt.template, tuple(TEMPLATES)),
        ("prompt.padding_side", stage.prompt.padding_side, ("right", "left")),
        ("param_dtype", stage.param_dtype, FLOAT_DTYPES),
        ("model.compute_dtype", stage.model.compute_dtype, FLOAT_DTYPES),
        ("optimizer.first_moment_dtype", stage.optimizer.first_moment_dtype, FLOAT_DTYPES),
    ):
        if value not in known:
            yield f"{name} is {value!r}; expected {' or '.join(map(str, known))}"


def _counts(stage: TrainConfig) -> Iterator[str]:
    names = ("steps", "batch_size", "accumulate", "max_skipped", "log_every", "checkpoint_every")
    numbers = {name: getattr(stage, name) for name in (*names, "keep")}
    numbers |= {f"mesh.{axis}": size for axis, size in dataclasses.asdict(stage.mesh).items()}
    numbers |= {"prompt.max_length": stage.prompt.max_length}
    if stage.heldout is not None:
        numbers |= {"heldout.batches": stage.heldout.batches, "heldout.every": stage.heldout.every}
    for name, number in numbers.items():
        if number < 1:
            yield f"{name} is {number}; it must be 1 or more"
    offs = {name: getattr(stage, name) for name in ("loss_chunk", "z_loss", "keep_every")}
    for name, number in (offs | {"optimizer.max_grad_norm": stage.optimizer.max_grad_norm}).items():
        if not 0 <= number < math.inf:
            yield f"{name} is {number}; it must be 0 (off) or more"


def _shares(stage: TrainConfig) -> Iterator[str]:
    optimizer = stage.optimizer
    for rate in (optimizer.learning_rate, *(group.learning_rate for group in optimizer.groups)):
        if not 0 <= rate < math.inf:
            yield f"a learning rate is {rate}; it must be 0 or more"
    shares = {"bad_samples": stage.bad_samples, "optimizer.warmup_ratio": optimizer.warmup_ratio}
    for name, share in shares.items():
        if not 0 <= share <= 1:
            yield f"{name} is {share}; it is a share, from 0 to 1"
    for name, beta in {"beta1": optimizer.beta1, "beta2": optimizer.beta2}.items():
        if not 0 <= beta < 1:
            yield f"optimizer.{name} is {beta}; it must be from 0 to below 1"


def _lengths(stage: TrainConfig) -> Iterator[str]:
    lengths, longest = stage.lengths, stage.prompt.max_length
    if not lengths or list(lengths) != sorted(set(lengths)) or lengths[0] < 1:
        yield f"lengths is {lengths}; expected increasing sizes, such as (128, 256, 512)"
    if lengths[-1] < longest:
        yield (
            f"the longest of lengths is {lengths[-1]}, but rows may have prompt.max_length = "
            f"{longest} positions: add that length, or lower max_length"
        )
    llm = stage.model.llm
    if isinstance(llm.rope.scaling, DynamicScaling) and longest > llm.max_positions:
        yield (
            f"prompt.max_length is {longest}, but the language model's rotary positions"
            f" depend on the length of a text beyond {llm.max_positions} positions (dynamic"
            " scaling), which is not supported: lower max_length, or use linear or yarn scaling"
        )


def _batch(stage: TrainConfig) -> Iterator[str]:
    # Every device must have as many rows of each micro-batch.
    shards = stage.mesh.batch_shards
    parts = stage.accumulate * shards
    if stage.batch_size % parts:
        yield (
            f"batch_size {stage.batch_size} cannot be divided into accumulate = "
            f"{stage.accumulate} micro-batches over mesh.data x mesh.fsdp = {shards} devices: "
            f"make it a multiple of {parts}, or change accumulate or the mesh"
        )


def _packing(stage: TrainConfig) -> Iterator[str]:
    window, images = stage.packing.window, stage.packing.images
    if window < 0 or images < 0:
        yield f"packing is window {window}, images {images}; each must be 0 (none) or more"
    if not window:
        if images:
            yield f"packing.images {images} changes nothing without packing.window: give both"
        return
    model, kind = stage.model, stage.model.compressor.kind
    if model.declared.inside or model.inside_layers:
        yield (
            f'compressor "{kind}" continues inside the LLM, which needs one conversation a row:'
            " turn packing off"
        )
    if stage.prompt.padding_side == "left":
        yield "packed rows are padded on the right: set prompt.padding_side to right"
    if stage.draw_tokens:
        yield "rows are packed before their numbers of tokens are drawn: leave out draw_tokens"
    if isinstance(stage.data, SourcesConfig) and stage.data.grouping != "none":
        yield (
            f'packing finds rows among conversations of all kinds: set data.grouping to "none", not'
            f' "{stage.data.grouping}"'
        )
    if window < 2 * stage.batch_size:
        yield (
            f"packing.window is {window} conversations, too few for rows of a batch of"
            f" {stage.batch_size}: give {2 * stage.batch_size} or more, such as 4096"
        )


def spec_of(stage: TrainConfig) -> LlavaMini:
    """The model's parameters in the form that the stage trains them in, bases of LoRA as floats."""
    spec = stacked_spec(stage)
    return spec if stage.scan_layers else llava_mini.unrolled(spec)


def stacked_spec(stage: TrainConfig) -> LlavaMini:
    """The same with all layers stacked."""
    return with_changes(llava_mini.spec(stage.model), stage.lora)


def abstract_params(stage: TrainConfig) -> LlavaMini:
    """The shapes, dtypes and shardings of a stage's parameters."""
    return lora.with_base(param_tree.abstract(spec_of(stage), stage.param_dtype), stage.lora)


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
