"""All Orbax calls: saving and restoring a training run's state, asynchronous and sharded.

    workdir/checkpoints/STAGE/STEP/           state (TrainState), about (json: fingerprints, config)
    workdir/checkpoints/STAGE/damaged-STEP/   set aside: what could not be restored

A step's folder appears under its name only when it is complete. What happens to its files later
(a truncated copy, a flipped bit, a lost shard, which reads as zeros) is found by fingerprints: for
every array a number that the devices compute from all of its bits, when saving and when restoring.
Hashing files instead would read every checkpoint back from its bucket.

On several processes all take part in everything, and what one of them cannot restore none does.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from llava_mini_jax import distributed
from llava_mini_jax.errors import InputError, memory_sentence

_ODD = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0x9E3779B9)


class Resumed(NamedTuple):
    step: int  # 0: there is no checkpoint
    state: Any  # or None
    about: dict[str, Any]  # what it was saved with


class Checkpoints:
    """The checkpoints of one stage of a run; use as a context manager, which waits for saves."""

    def __init__(self, folder: str | epath.Path, *, keep: int = 2, keep_every: int = 0):
        """Holds the newest `keep`, and for ever those of every `keep_every`th step (0: of none)."""
        # Takes more than a second, which those who ask a model need not wait for.
        import orbax.checkpoint as ocp

        self._ocp = ocp
        with distributed.waiting("the folder of checkpoints"):
            self._manager = self._open(folder, keep, keep_every)

    def _open(self, folder: str | epath.Path, keep: int, keep_every: int) -> Any:
        ocp = self._ocp
        return ocp.CheckpointManager(
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
            with self._writing(), distributed.waiting("the checkpoint's end"):
                try:
                    self._manager.wait_until_finished()
                finally:
                    self._manager.close()  # raises what of a failed save nobody has been told yet
        except InputError:
            if kind is None:  # else the error that ended the stage is the one to tell
                raise

    def save(self, step: int, state: Any, about: dict[str, Any]) -> None:
        """Copies the arrays and returns; the files are written while training goes on.

        Raises InputError if this or the save before fails (disk full, folder read-only); the
        checkpoints before that stay whole.
        """
        args = self._ocp.args
        about = {**about, "fingerprints": fingerprints(state)}
        with self._writing(), distributed.waiting(f"the checkpoint of step {step}"):
            saved = self._manager.save(
                step,
                args=args.Composite(state=args.StandardSave(state), about=args.JsonSave(about)),
            )
        if not saved:
            raise InputError(
                f"the checkpoint of step {step} was not written, because "
                f"{self._manager.directory} has one of step {self._manager.latest_step()}: if "
                "another run uses this workdir too, end one of them or give it another --workdir"
            )

    def resume(self, like: Any) -> Resumed:
        """The newest checkpoint that is whole, on all processes the same.

        `like` gives shapes, dtypes and shardings, of any mesh; its arrays may be abstract. A
        damaged checkpoint is set aside, said on stderr, and the one before is taken. Raises
        InputError if none can be restored: a run must not begin again silently.
        """
        own = sorted(self._manager.all_steps(), reverse=True)
        # Process 0's list: a restore is done by all together, so all must try the same steps.
        steps = distributed.gather_json(own if distributed.is_first() else [])
        problems: dict[int, str] = {}
        for step in steps:
            found, problem = self._restore(step, like)
            if problem:
                problems[step] = problem
                continue
            self._set_aside(problems, step)
            return Resumed(step, found["state"], found["about"])
        if problems:
            raise InputError(
                f"checkpoint {self._manager.directory / str(steps[0])} cannot be restored "
                f"({problems[steps[0]]}), nor any other of its stage: use the config it was made "
                f"with; if it is damaged, remove {self._manager.directory} to restart the stage"
            )
        return Resumed(0, None, {})

    def _restore(self, step: int, like: Any) -> tuple[Any, str]:
        """(what was saved, why it cannot be used by some process or "")."""
        args, problem = self._ocp.args, ""
        found: Any = None
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        try:
            # The manager's own restore waits for all processes at its end: for ever, if one fails.
            found = self._ocp.CompositeCheckpointHandler().restore(
                self._manager.directory / str(step),
                args=args.Composite(state=args.StandardRestore(abstract), about=args.JsonRestore()),
            )
            written = dict(found["about"]["fingerprints"])
        except Exception as error:  # of many types; for damaged array data a plain Exception
            if memory_sentence(error, ""):
                raise  # which says nothing about the checkpoint
            problem = (str(error) or type(error).__name__).splitlines()[0]
        if problem := _anyones(problem):
            return None, problem
        read = fingerprints(found["state"])  # by all processes together
        wrong = [path for path in read if written.get(path) != read[path]]
        if wrong:
            problem = f"{len(wrong)} of its arrays changed since, such as {wrong[0]}"
        return found, _anyones(problem)

    def _set_aside(self, problems: dict[int, str], taken: int) -> None:
        folder = self._manager.directory
        for step, reason in problems.items() if distributed.is_first() else ():
            target = folder / f"damaged-{step}"
            print(
                f"checkpoint {folder / str(step)} is damaged ({reason}): continuing from step "
                f"{taken}; the damaged one is now {target.name}",
                file=sys.stderr,
            )
            if target.exists():
                target.rmtree()
            (folder / str(step)).rename(target)
        if problems:
            distributed.wait_for_all()  # the first process has moved them
            # Orbax remembers which steps there were.
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
                "earlier checkpoints are intact"
            ) from error


def _anyones(problem: str) -> str:
    """The problem of the first process that has one; all of them ask."""
    return next(iter(distributed.gather_json([problem] if problem else [])), "")


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
        # Places in the whole array, not in a shard: so the sum is the same on every mesh.
        iota = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place += (iota + 1) * jnp.uint32(_ODD[axis])
    place ^= place >> 15
    return jnp.sum(words * (place * 2 + 1), dtype=jnp.uint32)
