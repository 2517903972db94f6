"""The folder of a run: its configuration, and the models that its stages leave."""

import dataclasses
import json
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from llava_mini_jax import distributed
from llava_mini_jax.config import Bundle
from llava_mini_jax.data.media.video import FrameSampling
from llava_mini_jax.data.text.chat_template import today
from llava_mini_jax.errors import InputError
from llava_mini_jax.journal import write_whole
from llava_mini_jax.models.llava_mini import LlavaMini
from llava_mini_jax.terminal import columns
from llava_mini_jax.training.stages import TrainConfig, bundle_of
from llava_mini_jax.weights.export_adapter import export_adapter, take_part
from llava_mini_jax.weights.export_hf import export_model, gather_model
from llava_mini_jax.weights.hub import resolve_folder

# What a run may be continued with differently: nothing of it changes an update.
FREE = (
    *("mesh", "accumulate", "loss_chunk", "max_skipped", "bad_samples", "heldout"),
    *("log_every", "checkpoint_every", "keep", "keep_every"),
)
DATA = ("data",)
_SEEN_WITHIN = 30.0  # seconds that a network disk may take to show a new file


def open_workdir(
    workdir: str, stages: Sequence[TrainConfig], accept_changed_data: bool = False
) -> epath.Path:
    """The folder, with config.json; one with checkpoints of another configuration is refused.

    `accept_changed_data`: what a configuration says of data may be different.
    """
    folder = distributed.together(lambda: _opened(workdir, stages, accept_changed_data))
    _check_shared(folder)
    if distributed.is_first():
        write_whole(folder / "config.json", _as_json(stages))
    return folder


def places(folder: epath.Path) -> list[str]:
    """Where a run leaves what people look for, a line each."""
    return columns(
        [
            ["metrics", str(folder / "metrics.jsonl")],
            ["board", f"tensorboard --logdir {folder / 'tensorboard'}"],
            ["checkpoints", f"{folder / 'checkpoints'}/STAGE/STEP"],
            ["models", f"{folder}/STAGE/model, at the end of each stage"],
        ],
        left=2,
    )


def _opened(workdir: str, stages: Sequence[TrainConfig], accept_changed_data: bool) -> epath.Path:
    folder = epath.Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except ImportError as error:
        raise InputError(
            f"workdir {workdir} is in a bucket, which needs one more package ({error}): for gs:// "
            "pip install 'llava-mini-jax[gcs]', or give a local folder"
        ) from error
    except Exception as error:  # OSError, or what a bucket's library makes of one
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"workdir {workdir} cannot be made ({reason}): give another") from error
    path = folder / "config.json"
    trained = any((folder / "checkpoints").glob("*/*"))
    changed = changed_fields(folder, stages) if trained else []
    of_data = [name for name in changed if name.rpartition(".")[2] in DATA]
    if accept_changed_data:
        changed = [name for name in changed if name not in of_data]
    if changed:
        accept = ", or accept other data with --accept-changed-data" * (changed == of_data)
        raise InputError(
            f"{path} was written by a run with another configuration (it differs in "
            f"{', '.join(changed[:3])}{', ...' * (len(changed) > 3)}): give another --workdir, "
            f"or use the same configuration to continue that run{accept}"
        )
    return folder


def date_of_run(workdir: epath.Path) -> str:
    """The day on which the run began ("2024-07-26"), for chat templates that ask for the date."""
    path = workdir / "date.txt"
    if distributed.is_first() and not path.exists():
        write_whole(path, today() + "\n")
    distributed.wait_for_all()
    return path.read_text().strip()


def _check_shared(folder: epath.Path) -> None:
    """InputError unless all processes see the same folder: they write checkpoints together."""
    if distributed.count() == 1:
        return
    # Random: the file that another run has left must not pass for this one's.
    [token] = distributed.gather_json([secrets.token_hex(8)] if distributed.is_first() else [])
    path = folder / f".shared-{token}"
    if distributed.is_first():
        path.write_text(token)
    distributed.wait_for_all()  # it is written
    end = time.monotonic() + _SEEN_WITHIN
    while not (seen := path.exists()) and time.monotonic() < end:
        time.sleep(0.5)
    blind = distributed.gather_json([] if seen else [distributed.index()])
    if distributed.is_first():
        # All have looked: the gather has waited for them.
        path.unlink(missing_ok=True)
    if blind:
        raise InputError(
            f"workdir {folder} of process {blind[0]} is not that of process 0: neither sees what "
            "the other writes there; give a --workdir on a disk, or in a bucket, that all "
            "machines share"
        )


def changed_fields(folder: epath.Path, stages: Sequence[TrainConfig]) -> list[str]:
    """Fields that decide what is learnt and are others in the folder's config.json, if any."""
    path = folder / "config.json"
    if not path.exists():
        return []
    before, now = _flat(json.loads(path.read_text())), _flat(json.loads(_as_json(stages)))
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def _as_json(stages: Sequence[TrainConfig]) -> str:
    return json.dumps([dataclasses.asdict(stage) for stage in stages], indent=2) + "\n"


def _flat(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """{"stage1.seed": 0, ...}, without what is FREE and how the model is computed."""
    found = {}
    for stage in stages:
        # What is computed twice, and by which kernel, is not what comes out.
        model = {**stage["model"], "remat": None, "attention": None}
        stage = {**stage, "model": model}
        stage["prompt"] = {"date": "", **stage["prompt"]}  # which runs begun without it had
        stage |= {name: v for name, v in _later_fields().items() if name not in stage}
        stage["data"] = _data(dict(stage["data"]), stage.pop("samples", None))
        found |= {f"{stage['name']}.{k}": value for k, value in stage.items() if k not in FREE}
    return found


def _later_fields() -> dict[str, Any]:
    """Fields that configurations of old do not have, with what they meant: their defaults."""
    made = {
        field.name: field.default
        for field in dataclasses.fields(TrainConfig)
        if field.default is not dataclasses.MISSING
    }
    return json.loads(json.dumps(made, default=dataclasses.asdict))


def _data(data: dict[str, Any], samples: int | None) -> dict[str, Any]:
    """As configurations say it now; earlier ones had `samples` beside the data, and flat videos."""
    if "fps" in data:
        sampling = FrameSampling(fps=data.pop("fps"), max_frames=data.pop("max_frames"))
        data["video"] = dataclasses.asdict(sampling)
    if samples is not None and "datasets" not in data:
        data["samples"] = samples
    if "kinds" in data:  # the digits world, which had one wording
        data.setdefault("wording", "brief")
    return data


def leave_model(params: LlavaMini, bundle: Bundle, target: epath.Path, tokenizer: Any) -> None:
    """The parameters as a Hugging Face folder, if it is not there yet; all processes take part."""
    _leave(
        target,
        lambda folder: export_model(params, bundle, folder, tokenizer=tokenizer),
        lambda: gather_model(params, bundle),
    )


def leave_adapter(
    params: LlavaMini, stage: TrainConfig, target: epath.Path, tokenizer: Any, before: str
) -> None:
    """What a stage with LoRA has learnt, likewise: an adapter of the model that it started from,
    which is that of the stage `before` where it went on from there."""
    if stage.start == "previous":
        base, left = f"../../{before}/model", target.parent.parent / before / "model"
        place = None if "://" in str(left) else Path(left)
    else:
        base, place = stage.start, resolve_folder(stage.start)
    bundle, lora, trainable = bundle_of(stage, tokenizer), stage.lora, stage.trainable
    more: dict[str, Any] = dict(lora=lora, trainable=trainable, base=base, place=place)
    _leave(
        target,
        lambda folder: export_adapter(params, bundle, folder, tokenizer=tokenizer, **more),
        lambda: take_part(params, bundle, lora, trainable),
    )


def _leave(target: epath.Path, export: Callable[[Path], None], others: Callable[[], None]) -> None:
    """`export` to a folder or a bucket, on the first process, while the others do their part."""
    exists = (target / "config.json").exists()  # the last file of a copy to a bucket
    distributed.wait_for_all()  # all have looked
    if exists:
        return
    if not distributed.is_first():
        others()
    elif "://" not in str(target):
        export(Path(target))
    else:  # a bucket
        with tempfile.TemporaryDirectory() as work:
            export(Path(work) / "model")
            files = sorted((Path(work) / "model").iterdir())
            # config.json is last: a folder without it is no model, so no half of one passes.
            for file in sorted(files, key=lambda file: file.name == "config.json"):
                with file.open("rb") as source, (target / file.name).open("wb") as copy:
                    shutil.copyfileobj(source, copy)
    distributed.wait_for_all()  # it is whole before anyone reads it
