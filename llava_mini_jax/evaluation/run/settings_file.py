"""settings.json: what the answers beside it were made with, so that others do not join them.

model, benchmark --runner.settings_of--> settings --check_same--> FOLDER/settings.json
questions --digest--> one of them                      '--> InputError: other answers are there
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.benchmark import Question
from llava_mini_jax.evaluation.run import answers
from llava_mini_jax.journal import write_whole

_NAME = "settings.json"


def digest(questions: Sequence[Question]) -> str:
    """Names what a benchmark's questions say to the model, in whatever order they stand.

    Of all its questions: parts and shards of them belong together.
    """
    pairs = sorted((question.key, question.text) for question in questions)
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def read(folder: Path) -> dict[str, Any]:
    """The settings of a folder of answers; {} where it has none, as where answers were copied."""
    path = folder / _NAME
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        found = error
    if isinstance(found, dict):
        return found
    raise InputError(
        f"{path} holds no settings ({found}): remove it and its answers to ask again, or copy"
        " it again from where the answers were made"
    )


def check_same(folder: Path, settings: Mapping[str, Any]) -> None:
    """Keeps the settings in the folder, for `runner.ask` to put answers there.

    Raises InputError, with the names of what changed, if it has answers of other settings.
    """
    text = json.dumps(settings, sort_keys=True, default=str)
    before, now = read(folder), json.loads(text)
    changed = [name for name in before | now if before.get(name) != now.get(name)]
    if before and not changed:
        return
    if before and answers.files(folder):
        refuse(folder, changed)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / _NAME, text + "\n")


def refuse(folder: Path, changed: Sequence[str]) -> None:
    raise InputError(
        f"{folder} holds answers that were made with other settings ({', '.join(sorted(changed))}):"
        " give another --out, or remove them to ask again"
    )
