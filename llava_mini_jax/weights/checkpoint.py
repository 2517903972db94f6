"""All Orbax calls: saving and restoring a training run's state, asynchronous and sharded.

    workdir/checkpoints/STAGE/STEP/           state (TrainState), about (json: fingerprints, config)
    workdir/checkpoints/STAGE/damaged-STEP/   set aside: what could not be restored

A step's folder appears under its name only when it is complete. What happens to its files later
(a truncated copy, a flipped bit, a lost shard, which reads as zeros) is found by fingerprints: for
every array a number that the devices compute from all of its bits, when saving and when restoring.
Hashing files instead would read every checkpoint back from its bucket.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from llava_mini_jax.errors import InputError

_ODD = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0x9E3779B9)


class Checkpoints:
    """The checkpoints of one stage of a run; use as a context manager, which waits for saves."""

    def __init__(self, folder: str | epath.Path, *, keep: int = 2, keep_every: int = 0):
        """Holds the newest `keep`, and for ever those of every `keep_every`th step (0: of none)."""
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._manager = ocp.CheckpointManager(
            epath.Path(folder).absolute() if "://" not in str(folder) else epath.Path(folder),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                keep_period=keep_every or None,
                enable_async_checkpointing=True,
                create=True,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            with self._writing():
                self._manager.wait_until_finished()
        except InputError:
            if kind is None:  # else the error that ended the stage is the one to tell
                raise
        finally:
            self._manager.close()

    def save(self, step: int, state: Any, about: dict[str, Any]) -> None:
        """Copies the arrays and returns; the files are written while training goes on.

        Raises InputError if this or the save before fails (disk full, folder read-only); the
        checkpoints before that stay whole.
        """
        args = self._ocp.args
        about = {**about, "fingerprints": fingerprints(state)}
        with self._writing():
            self._manager.save(
                step,
                args=args.Composite(state=args.StandardSave(state), about=args.JsonSave(about)),
            )

    def resume(self, like: Any) -> tuple[int, Any]:
        """(step, state) of the newest checkpoint that is whole; (0, `like`) if there is none.

        `like` gives shapes, dtypes and shardings, of any mesh. A damaged checkpoint is set aside,
        said on stderr, and the one before is taken. Raises InputError if none can be restored: a
        run must not begin again silently.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        problems: dict[int, str] = {}
        for step in steps:
            try:
                state = self._restore(step, like)
            except Exception as error:  # of many types; for damaged array data a plain Exception
                problems[step] = (str(error) or type(error).__name__).splitlines()[0]
                continue
            for damaged, reason in problems.items():
                self._set_aside(damaged, reason, step)
            return step, state
        if problems:
            raise InputError(
                f"checkpoint {self._manager.directory / str(steps[0])} cannot be restored "
                f"({problems[steps[0]]}), nor any other of its stage: use the config it was made "
                f"with; if it is damaged, remove {self._manager.directory} to begin the stage again"
            )
        return 0, like

    def _restore(self, step: int, like: Any) -> Any:
        args = self._ocp.args
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        found = self._manager.restore(
            step,
            args=args.Composite(state=args.StandardRestore(abstract), about=args.JsonRestore()),
        )
        written, read = found["about"]["fingerprints"], fingerprints(found["state"])
        wrong = [path for path in read if written.get(path) != read[path]]
        if wrong:
            raise ValueError(f"{len(wrong)} of its arrays changed since, such as {wrong[0]}")
        return found["state"]

    def _set_aside(self, step: int, reason: str, taken: int) -> None:
        folder = self._manager.directory
        target = folder / f"damaged-{step}"
        print(
            f"checkpoint {folder / str(step)} is damaged ({reason}): continuing from step {taken}; "
            f"the damaged one is now {target.name}",
            file=sys.stderr,
        )
        if jax.process_index() == 0:
            if target.exists():
                target.rmtree()
            (folder / str(step)).rename(target)
        self._manager.reload()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # OSError, or what tensorstore makes of one
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(
                f"a checkpoint in {self._manager.directory} cannot be written ({reason:.300}): "
                "make room or give a writable --workdir, and start the same command again; "
                "earlier checkpoints are whole"
            ) from error


def fingerprints(tree: Any) -> dict[str, int]:
    """A 32-bit number for every array, by its path: the same on every mesh.

    Every word of an array is multiplied by an odd number that depends on its place, and all are
    added modulo 2^32. So a change of one word always changes the sum, and a change of many, or an
    exchange of two, does so but for one case in 2^32.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    sums = jax.device_get(_fingerprints([leaf for _, leaf in leaves]))
    paths = [jax.tree_util.keystr(path) for path, _ in leaves]
    return {path: int(number) for path, number in zip(paths, sums, strict=True)}


@jax.jit
def _fingerprints(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_fingerprint(leaf) for leaf in leaves]


def _fingerprint(x: jax.Array) -> jax.Array:
    bits = x.astype(jnp.uint8) if x.dtype == bool else x
    words = bits.view(f"uint{8 * bits.dtype.itemsize}").astype(jnp.uint32)
    place = jnp.zeros_like(words)
    for axis in range(x.ndim):
        iota = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place += (iota + 1) * jnp.uint32(_ODD[axis])
    place ^= place >> 15
    return jnp.sum(words * (place * 2 + 1), dtype=jnp.uint32)
