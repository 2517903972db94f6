"""The loop: stages one after the other, each resumable at its newest checkpoint.

workdir/  config.json                    the resolved configuration
          checkpoints/STAGE/STEP/        training state (weights/checkpoint.py)
          metrics.jsonl                  a line every `log_every` steps
          STAGE/model/                   the stage's result as a Hugging Face folder
"""

import contextlib
import dataclasses
import json
import signal
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from llava_mini_jax import params as param_tree
from llava_mini_jax import sharding
from llava_mini_jax.data.digits import DigitsConfig, DigitsPages, build_tokenizer
from llava_mini_jax.data.examples import Buckets, powers_of_two
from llava_mini_jax.data.pipeline import Encoder, Source, make_batches
from llava_mini_jax.data.sources import Samples
from llava_mini_jax.data.tokenizer import load_tokenizer
from llava_mini_jax.errors import InputError
from llava_mini_jax.models.llava_mini import LlavaMini
from llava_mini_jax.training.metrics import Metrics
from llava_mini_jax.training.optimizer import make_optimizer
from llava_mini_jax.training.stages import (
    TrainConfig,
    bundle_of,
    check,
    starting_params,
)
from llava_mini_jax.training.step import init_state, train_step
from llava_mini_jax.weights.checkpoint import Checkpoints
from llava_mini_jax.weights.export_hf import export_model
from llava_mini_jax.weights.folders import load_params, open_model, resolve_folder

MAX_FRAMES = 1024  # images or frames of one training sample


class Stopped(Exception):  # noqa: N818  an end that was asked for, not an error
    """A run ended early because it was asked to; its newest checkpoint has every step."""


def run(stages: Sequence[TrainConfig], workdir: str) -> None:
    """Trains all stages; a workdir that holds checkpoints is continued where it stopped.

    SIGTERM, which clusters send before they take a machine away, ends it with a checkpoint of the
    current step and raises Stopped.
    """
    for stage in stages:
        check(stage)
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise InputError(f"stages are named {', '.join(names)}; give each a name of its own")
    folder = epath.Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be made ({error}): give another") from error
    _write_config(folder, stages)
    params = None
    try:
        with _sigterm() as stop:
            for stage in stages:
                with _mesh(stage):
                    params = run_stage(stage, folder, params, stop)
    except OSError as error:
        raise InputError(
            f"workdir {workdir} cannot be written ({error}): make room or give a writable "
            "--workdir, and start the same command again; earlier checkpoints are whole"
        ) from error


def run_stage(
    stage: TrainConfig,
    workdir: epath.Path,
    previous: LlavaMini | None,
    stop: Sequence[int] = (),  # no longer empty once the run has to stop
) -> LlavaMini:
    """One stage from its start or its newest checkpoint to its end; returns the parameters."""
    key = jax.random.fold_in(jax.random.key(stage.seed), zlib.crc32(stage.name.encode()))
    tokenizer = make_tokenizer(stage.tokenizer)
    if len(tokenizer) > stage.model.llm.vocab_size:
        raise InputError(
            f"{stage.name}: the tokenizer has {len(tokenizer)} tokens, but the language model's "
            f"vocab_size is {stage.model.llm.vocab_size}; raise it, or use the model's tokenizer"
        )
    params = starting_params(stage, _start(stage, previous), key)
    trainable, _ = param_tree.split(params, lambda p: param_tree.matches(p, stage.trainable))
    optimizer = make_optimizer(stage.optimizer, stage.steps, trainable)
    state = init_state(params, stage.trainable, optimizer)
    del params, trainable, previous  # the state's arrays are donated from here on
    with Checkpoints(workdir / "checkpoints" / stage.name) as checkpoints:
        first_step, state = checkpoints.resume(state)
        if first_step < stage.steps:
            batches = _batches(stage, tokenizer, first_step)
            with Metrics(workdir, stage.name, stage.steps, first_step) as metrics:
                for step in range(first_step + 1, stage.steps + 1):
                    batch = sharding.put_batch(next(batches))
                    state, values = train_step(
                        state,
                        batch,
                        cfg=stage.model,
                        optimizer=optimizer,
                        accumulate=stage.accumulate,
                        loss_chunk=stage.loss_chunk,
                        z_loss=stage.z_loss,
                    )
                    metrics.add(values, stage.batch_size)
                    if step % stage.log_every == 0 or step == stage.steps:
                        _check_skipped(metrics.log(step), step, stage)
                    stopping = bool(stop) and step < stage.steps
                    if step % stage.checkpoint_every == 0 or step == stage.steps or stopping:
                        checkpoints.save(step, state, {"stage": stage.name})
                    if stopping:
                        raise Stopped(f"{stage.name} stopped at step {step} of {stage.steps}")
    params = param_tree.merge(state.trainable, state.frozen)
    target = Path(workdir) / stage.name / "model"
    if not target.exists() and jax.process_index() == 0:
        export_model(params, bundle_of(stage, tokenizer), target, tokenizer=tokenizer)
    return params


def _check_skipped(values: dict[str, float], step: int, stage: TrainConfig) -> None:
    count = int(values["skipped_in_a_row"])
    if count >= stage.max_skipped:
        raise InputError(
            f"{stage.name}: {count} steps in a row, seen at step {step}, had no finite loss or "
            f"gradient and were skipped; max_skipped is {stage.max_skipped}. The same command with "
            f"this workdir (seed {stage.seed}) replays them from the last checkpoint; lower "
            "the learning rate, or look at the samples there"
        )


def make_tokenizer(name: str) -> Any:
    return build_tokenizer() if name == "digits" else load_tokenizer(name)


def _start(stage: TrainConfig, previous: LlavaMini | None) -> LlavaMini | None:
    if stage.start == "fresh":
        return None
    if stage.start == "previous":
        if previous is None:
            raise InputError(f'{stage.name}: start is "previous", but no stage comes before it')
        return previous
    folder = resolve_folder(stage.start)
    bundle, published = open_model(folder, compute_dtype=stage.model.compute_dtype)
    return load_params(bundle, published, dtype=stage.param_dtype, unrolled=not stage.scan_layers)


def _source(stage: TrainConfig) -> Source:
    if isinstance(stage.data, DigitsConfig):
        return DigitsPages(stage.data, stage.samples)
    return Samples(stage.data)


def _batches(stage: TrainConfig, tokenizer: Any, first_step: int) -> Any:
    return make_batches(
        _source(stage),
        Encoder(tokenizer, stage.prompt, stage.images),
        batch_size=stage.batch_size,
        tokens_per_image=stage.model.tokens_per_image(stage.images.parts),
        patches_per_image=stage.model.patches_per_image(stage.images.parts)
        if stage.model.inside_layers
        else 0,
        buckets=Buckets(lengths=stage.lengths, images=powers_of_two(1, MAX_FRAMES)),
        max_length=stage.prompt.max_length,
        padding_side=stage.prompt.padding_side,
        seed=stage.seed,
        first_step=first_step,
        process=jax.process_index(),
        processes=jax.process_count(),
    )


def _mesh(stage: TrainConfig) -> contextlib.AbstractContextManager:
    sizes = dataclasses.asdict(stage.mesh)
    if all(size == 1 for size in sizes.values()):
        return contextlib.nullcontext()
    return jax.set_mesh(sharding.make_mesh(**sizes))


@contextlib.contextmanager
def _sigterm() -> Iterator[list[int]]:
    """A list to which SIGTERM adds itself; Python allows that in the main thread only.

    Several processes get it at different steps, and would wait for each other for ever: they end.
    """
    received: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or jax.process_count() > 1:
        yield received
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def _write_config(folder: epath.Path, stages: Sequence[TrainConfig]) -> None:
    """The resolved config; a workdir with checkpoints of another one is refused."""
    text = json.dumps([dataclasses.asdict(stage) for stage in stages], indent=2) + "\n"
    path = folder / "config.json"
    if path.exists() and any((folder / "checkpoints").glob("*/*")):
        before, now = _flat(json.loads(path.read_text())), _flat(json.loads(text))
        changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if changed:
            raise InputError(
                f"{path} was written by a run with another configuration (it differs in "
                f"{', '.join(changed[:3])}{', ...' * (len(changed) > 3)}): give another --workdir, "
                "or use the same configuration to continue that run"
            )
    path.write_text(text)


def _flat(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """{"stage1.seed": 0, ...}, without what a run may be continued with differently."""
    free = ("mesh", "accumulate", "loss_chunk", "max_skipped", "log_every", "checkpoint_every")
    return {
        f"{stage['name']}.{field}": value
        for stage in stages
        for field, value in stage.items()
        if field not in free
    }
