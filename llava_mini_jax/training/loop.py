"""The loop: stages one after the other, each resumable at its newest checkpoint.

workdir/  config.json                    the resolved configuration
          checkpoints/STAGE/STEP/        training state (training/checkpoint.py)
          metrics.jsonl, tensorboard/    every `log_every` steps (training/metrics.py)
          tracked_as.txt                 what other trackers call the run (training/trackers.py)
          quarantine.jsonl               broken samples (data/batches/quarantine.py)
          profile/STAGE/                 recorded steps (training/xprof.py)
          STAGE/model/                   the stage's result as a Hugging Face folder

On several processes each runs all of this; feed.py makes them agree, and the first one writes.
"""

import contextlib
import dataclasses
import signal
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import optax
from etils import epath

from llava_mini_jax import compilation, distributed, sharding
from llava_mini_jax import params as param_tree
from llava_mini_jax.data.digits.pages import DigitsPages
from llava_mini_jax.data.sets.sources import Samples
from llava_mini_jax.errors import InputError
from llava_mini_jax.models.llava_mini import LlavaMini
from llava_mini_jax.ops.attention import describe
from llava_mini_jax.terminal import loading, note
from llava_mini_jax.training import feed, heldout, trackers
from llava_mini_jax.training.checkpoint import Checkpoints
from llava_mini_jax.training.first_step import FirstStep, fixed
from llava_mini_jax.training.metrics import Metrics
from llava_mini_jax.training.optimizer import learning_rates, make_optimizer
from llava_mini_jax.training.run_inputs import dated, open_data, tokenizer_of
from llava_mini_jax.training.stages import TrainConfig, abstract_params, bundle_of, check
from llava_mini_jax.training.start import starting_params
from llava_mini_jax.training.step import TrainState, abstract_state, init_state, train_step
from llava_mini_jax.training.trackers import TrackConfig
from llava_mini_jax.training.workdir import leave_adapter, leave_model, open_workdir, places
from llava_mini_jax.training.xprof import ProfileConfig, Profiler
from llava_mini_jax.weights.export_adapter import refuse_base
from llava_mini_jax.weights.folders import open_model
from llava_mini_jax.weights.hub import resolve_folder
from llava_mini_jax.weights.import_hf import load_params

NO_PROFILE = ProfileConfig()


class Stopped(Exception):  # noqa: N818  an end that was asked for, not an error
    """A run ended early because it was asked to; its newest checkpoint has every step."""


def run(
    stages: Sequence[TrainConfig],
    workdir: str,
    profile: ProfileConfig = NO_PROFILE,
    accept_changed_data: bool = False,
    track: TrackConfig | None = None,
) -> None:
    """Trains all stages; resumes a workdir that holds checkpoints.

    If the data differ from those that the checkpoints were trained on, raises InputError, or with
    `accept_changed_data` resumes on the present data.

    SIGTERM, which clusters send before they take a machine away, ends the run after the next step
    with a checkpoint of that step, and raises Stopped. With several processes one signal is enough.
    """
    for stage in stages:
        check(stage)
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise InputError(f"stages are named {', '.join(names)}; give each its own name")
    trackers.check(track)
    params = None
    try:
        with _sigterm() as stop:
            folder = open_workdir(workdir, stages, accept_changed_data)
            before = ""
            for stage in stages:
                with _mesh(stage):
                    if not before and distributed.is_first():  # whose mesh there is
                        print(*places(folder), sep="\n", file=sys.stderr)
                    params = run_stage(
                        stage, folder, params, stop, profile, accept_changed_data, before, track
                    )
                # What an adapter belongs to may be rounded here: the next one reads both anew.
                params, before = None if stage.lora.rank else params, stage.name
    except OSError as error:
        raise InputError(
            f"workdir {workdir} cannot be written ({error}): make room or give a writable "
            "--workdir, and start the same command again; earlier checkpoints are intact"
        ) from error


def run_stage(
    stage: TrainConfig,
    workdir: epath.Path,
    previous: LlavaMini | None,
    stop: Sequence[int] = (),  # no longer empty once this process is asked to stop
    profile: ProfileConfig = NO_PROFILE,
    accept_changed_data: bool = False,
    before: str = "",
    track: TrackConfig | None = None,
) -> LlavaMini:
    """One stage from its start or its newest checkpoint to its end; returns the parameters.

    `previous` are those of the stage `before`; None: they are in the folder that it has left.
    """
    # By name, so that stages of one seed differ; not by `hash`, which Python salts.
    key = jax.random.fold_in(jax.random.key(stage.seed), zlib.crc32(stage.name.encode()))
    tokenizer = tokenizer_of(stage)
    stage = dated(stage, tokenizer, workdir)
    abstract, left = abstract_params(stage), workdir / before / "model" if before else None
    trainable, _ = param_tree.split(abstract, lambda p: param_tree.matches(p, stage.trainable))
    optimizer = make_optimizer(stage.optimizer, stage.steps, trainable)
    folder = workdir / "checkpoints" / stage.name
    with Checkpoints(folder, keep=stage.keep, keep_every=stage.keep_every) as checkpoints:
        like = abstract_state(abstract, stage.trainable, optimizer)
        first = FirstStep(stage, like, optimizer)
        first_step, state, about = checkpoints.resume(like)
        if state is None:
            params = starting_params(stage, _start(stage, previous, left), key)
            state = init_state(params, stage.trainable, optimizer)
            del params
        del previous  # the state's arrays are donated from here on
        if first_step < stage.steps:
            at = folder / str(first_step)
            source, data = open_data(stage, about, at, accept_changed_data)
            print(_beginning(stage, len(source), first_step), file=sys.stderr)
            about = {"stage": stage.name, "config": dataclasses.asdict(stage)}
            about |= {"samples": len(source), "data": data}
            state = _train(
                _Run(stage, workdir, tokenizer, first_step, first, stop, profile, track),
                state,
                optimizer,
                source,
                lambda step, state: checkpoints.save(step, state, about),
            )
    params = param_tree.merge(state.trainable, state.frozen)
    target = workdir / stage.name / "model"
    if stage.lora.rank:
        leave_adapter(params, stage, target, tokenizer, before)
    else:
        leave_model(params, bundle_of(stage, tokenizer), target, tokenizer)
    return params


@dataclasses.dataclass(frozen=True)
class _Run:
    """A stage whose steps from `first_step` on are still to be done."""

    stage: TrainConfig
    workdir: epath.Path
    tokenizer: Any
    first_step: int
    first: FirstStep
    stop: Sequence[int]
    profile: ProfileConfig
    track: TrackConfig | None


def _train(
    run: _Run,
    state: TrainState,
    optimizer: optax.GradientTransformation,
    source: DigitsPages | Samples,
    save: Callable[[int, TrainState], None],
) -> TrainState:
    """The state behind the last step. Raises Stopped where the run is asked to end before."""
    stage, workdir, first_step = run.stage, run.workdir, run.first_step
    arrivals = feed.arrivals(stage, source, run.tokenizer, workdir, first_step, run.stop)
    evaluate = heldout.evaluator(stage, run.tokenizer, workdir, first_step)
    begun = trackers.begin(run.track, workdir, stage)
    metrics = Metrics(workdir, stage.name, stage.steps, first_step, begun)
    unread = None  # a step whose metrics are due, and not read yet
    with metrics, Profiler(run.profile, workdir / "profile" / stage.name) as profiler:
        for step, arrival in arrivals:
            with profiler.step(step) as results:
                run.first.wait(arrival.batch)
                state, values = train_step(state, arrival.batch, **fixed(stage, optimizer))
                results.append(values)
            if news := compilation.news():
                note(f"{stage.name}: {news}")
            # Of a step before: while its values are read, the device has this one to do.
            if unread is not None:
                _log(metrics, unread, stage)
            metrics.add(values, feed.counted(stage, arrival))
            is_last = step == stage.steps
            stopping = arrival.stop and not is_last
            looks = stage.heldout and (step % stage.heldout.every == 0 or is_last)
            saves = step % stage.checkpoint_every == 0 or is_last or stopping
            unread = step if step % stage.log_every == 0 or is_last else None
            # Held-out data and checkpoints wait for the device anyway, and a run that goes on from
            # a checkpoint finds the lines of all steps before it.
            if unread is not None and (looks or saves):
                _log(metrics, unread, stage)
                unread = None
            if looks:
                metrics.log_heldout(step, evaluate(step, state))
            if saves:
                save(step, state)
            if stopping:
                raise Stopped(f"{stage.name} stopped at step {step} of {stage.steps}")
    metrics.show_curve()
    return state


def _beginning(stage: TrainConfig, samples: int, first_step: int) -> str:
    mesh = " ".join(f"{axis}={size}" for axis, size in dataclasses.asdict(stage.mesh).items())
    model, llm = stage.model, stage.model.llm
    return (
        f"{stage.name}: process {jax.process_index()} of {jax.process_count()}, "
        f"{jax.local_device_count()} of {jax.device_count()} devices, mesh {mesh}, continues from "
        f"step {first_step}; {feed.epochs(stage, samples)}; attention "
        f"{describe(model.attention, model.dtype, llm.head_width, windowed=llm.window is not None)}"
    )


def _log(metrics: Metrics, step: int, stage: TrainConfig) -> None:
    """Writes the line of `step`; InputError where too many steps in a row were skipped."""
    values = metrics.log(step, learning_rates(stage.optimizer, stage.steps, step))
    count = int(values["skipped_in_a_row"])
    if count >= stage.max_skipped:
        raise InputError(
            f"{stage.name}: {count} steps in a row, seen at step {step}, had no finite loss or "
            f"gradient and were skipped; max_skipped is {stage.max_skipped}. The same command with "
            f"this workdir (seed {stage.seed}) replays them from the last checkpoint; lower the "
            "learning rate, or look at the samples there"
        )


def _start(
    stage: TrainConfig, previous: LlavaMini | None, left: epath.Path | None = None
) -> LlavaMini | None:
    if stage.start == "fresh":
        return None
    if stage.start == "previous" and previous is not None:
        return previous
    if stage.start == "previous" and left is None:
        raise InputError(f'{stage.name}: start is "previous", but no stage comes before it')
    folder = resolve_folder(str(left) if stage.start == "previous" else stage.start)
    if stage.lora.rank:
        # Said before the run: at its end nothing could open what it has learnt.
        refuse_base(folder)
    bundle, published = open_model(folder, compute_dtype=stage.model.compute_dtype)
    with loading(str(folder)) as watch:
        return load_params(
            bundle,
            published,
            dtype=stage.param_dtype,
            unrolled=not stage.scan_layers,
            watch=watch,
        )


def _mesh(stage: TrainConfig) -> contextlib.AbstractContextManager:
    sizes, devices = dataclasses.asdict(stage.mesh), stage.mesh.devices
    if jax.process_count() > 1 and devices != jax.device_count():
        raise InputError(
            f"{stage.name}: the mesh {sizes} has {devices} devices, but the {jax.process_count()} "
            f"processes have {jax.device_count()}: give --mesh.fsdp (or data, tensor) so that "
            "their product is that"
        )
    if devices == 1:
        return contextlib.nullcontext()
    return jax.set_mesh(sharding.make_mesh(**sizes))


@contextlib.contextmanager
def _sigterm() -> Iterator[list[int]]:
    """A list to which SIGTERM adds itself; Python allows that in the main thread only."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        # None is a handler from outside of Python, which Python cannot put back.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
