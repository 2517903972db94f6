"""All Orbax calls: saving and restoring a training run's state, asynchronous and sharded.

    workdir/checkpoints/STAGE/STEP/   state (TrainState), about (json: config, versions)

A step's folder appears under its name only when it is complete, so the newest one is always whole.
"""

import json
from typing import Any

import jax
from etils import epath

from llava_mini_jax.errors import InputError


class Checkpoints:
    """The checkpoints of one stage of a run; use as a context manager, which waits for saves."""

    def __init__(self, folder: str | epath.Path, *, keep: int = 2):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._manager = ocp.CheckpointManager(
            epath.Path(folder).absolute() if "://" not in str(folder) else epath.Path(folder),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=True, create=True
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any, about: dict[str, Any]) -> None:
        """Copies the arrays and returns; the files are written while training goes on."""
        args = self._ocp.args
        self._manager.save(
            step,
            args=args.Composite(
                state=args.StandardSave(state), about=args.JsonSave(json.loads(json.dumps(about)))
            ),
        )

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """(state, about) of a step. `like` gives shapes, dtypes and shardings, of any mesh.

        Raises InputError where the state on disk is damaged, or of another model or optimiser.
        """
        args = self._ocp.args
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        try:
            found = self._manager.restore(
                step,
                args=args.Composite(state=args.StandardRestore(abstract), about=args.JsonRestore()),
            )
        except Exception as error:  # of many types; for damaged array data a plain Exception
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(
                f"checkpoint {self._manager.directory / str(step)} cannot be restored ({reason}): "
                "use the config it was made with; if it is damaged, remove its folder to continue "
                "from the one before"
            ) from error
        return found["state"], found["about"]
