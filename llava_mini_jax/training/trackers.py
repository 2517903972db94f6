"""Weights & Biases and trackio beside TensorBoard: `train.py ... --track.to wandb trackio`.

    values of a step --Metrics--> TensorBoard
                              '-> each Tracker --log(values, step)--> that package's run
    workdir/tracked_as.txt        what the runs are called: a workdir that is continued goes on
                                  with them

trackio took over wandb's interface, so one class serves both; a stage is a run of its own. Where
values go is for the packages to say (WANDB_MODE=offline, TRACKIO_SPACE_ID, a login of theirs). The
first process alone has them.
"""

import dataclasses
import importlib
import json
import re
import secrets
from collections.abc import Mapping
from typing import Any, Literal

from etils import epath

from llava_mini_jax import distributed
from llava_mini_jax.errors import InputError
from llava_mini_jax.journal import write_whole
from llava_mini_jax.signals import say
from llava_mini_jax.training.stages import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """Where metrics go in addition to TensorBoard. Raises InputError for an empty project."""

    to: tuple[Literal["wandb", "trackio"], ...] = ()  # packages, each an extra of that name
    project: str = "llava-mini"  # the project's name there

    def __post_init__(self) -> None:
        if not self.project:
            raise InputError('track.project is ""; give the project a name, such as llava-mini')


def check(cfg: TrackConfig | None) -> None:
    """Raises InputError, on all processes and before any work, for a package that is missing."""

    names = cfg.to if cfg is not None else ()

    def imported() -> None:
        for name in names if distributed.is_first() else ():
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise InputError(
                    f"track.to names {name}, which cannot be imported ({error}): pip install"
                    f" 'llava-mini-jax[{name}]', or leave it out"
                ) from error

    if names:
        distributed.together(imported)


def begin(cfg: TrackConfig | None, workdir: epath.Path, stage: TrainConfig) -> "list[Tracker]":
    """Those of a stage, on the first process; InputError on all where one cannot begin."""
    if cfg is None or not cfg.to:
        return []
    return distributed.together(
        lambda: _begun(cfg, workdir, stage) if distributed.is_first() else []
    )


def _begun(cfg: TrackConfig, workdir: epath.Path, stage: TrainConfig) -> "list[Tracker]":
    name = f"{_name_of(workdir)}-{stage.name}"
    return [
        Tracker(package, cfg.project, name, workdir, stage) for package in dict.fromkeys(cfg.to)
    ]


def _name_of(workdir: epath.Path) -> str:
    """The same whenever the workdir is continued, and another one for every workdir."""
    path = workdir / "tracked_as.txt"
    if not path.exists():
        # W&B's ids are made of few characters.
        folder = re.sub(r"[^\w.-]", "-", workdir.name, flags=re.ASCII)[:60] or "run"
        write_whole(path, f"{folder}-{secrets.token_hex(4)}\n")
    return path.read_text().strip()


class Tracker:
    """A stage's run of one package; what `Metrics` asks of it is what it asks of TensorBoard's.

    Raises InputError where the package begins no run. Later faults of it end the tracking, with a
    line on stderr, and not the training.
    """

    def __init__(
        self, package: str, project: str, name: str, workdir: epath.Path, stage: TrainConfig
    ):
        self._package = package
        module: Any = importlib.import_module(package)
        config = json.loads(json.dumps(dataclasses.asdict(stage)))
        more: dict[str, Any] = {}
        if package == "wandb":  # trackio finds a run by its name
            more = dict(id=name, allow_val_change=True)
            more |= {} if "://" in str(workdir) else dict(dir=str(workdir))
        try:
            self._run: Any = module.init(
                project=project, name=name, resume="allow", config=config, **more
            )
        except Exception as error:  # of servers, logins and disks
            raise InputError(
                f"{package} cannot start the run {name} ({_one_line(error)}): log in there, work"
                f" offline (WANDB_MODE=offline), or leave {package} out of --track.to"
            ) from error

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Steps that are taken again, behind the checkpoint of an interrupted run, are told again:
        W&B's server leaves them out, trackio has them twice."""
        if self._run is None:
            return
        try:
            self._run.log(dict(values), step=step)
        except Exception as error:  # as above
            self._lost(f"at step {step}", error)

    def close(self) -> None:
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:  # as above
            self._lost("at its end", error)

    def _lost(self, when: str, error: Exception) -> None:
        self._run = None
        say(
            f"{self._package} failed {when} ({_one_line(error)}) and gets no more of this stage;"
            " metrics.jsonl has everything"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
