"""What a server says of its model: its name, how it samples by default, and its fingerprint.

MODEL as it was given --served_name--> "llava-mini-7b"
generation_config.json --defaults--> temperature, top_p, top_k where a request has none
weights, prompts, versions, device --fingerprint--> "fp_..."
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax

import llava_mini_jax
from llava_mini_jax.errors import InputError, short
from llava_mini_jax.inference.model import Model
from llava_mini_jax.inference.prompt_template import written_as
from llava_mini_jax.json_fields import read_json
from llava_mini_jax.serving.asking import Defaults
from llava_mini_jax.training.checkpoint import fingerprints


def served_name(model: str) -> str:
    """A folder's own name; a name of the hub as it is."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def defaults(folder: Path) -> Defaults:
    """What generation_config.json says; InputError for values that no request could have.

    A config that does not sample (`do_sample` false) still names what samples are drawn with.
    """
    path = folder / "generation_config.json"
    values = read_json(path) if path.is_file() else {}

    def number(name: str, default: float, low: float, high: float) -> float:
        value = values.get(name)
        if value is None:
            return default
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
        ):
            raise InputError(
                f"{path}: {name} is {short(value)}; expected a number from {low:g} to {high:g}:"
                " correct or remove it"
            )
        return value

    top_p = number("top_p", 1.0, 0.0, 1.0)
    return Defaults(
        temperature=float(number("temperature", 1.0, 0.0, 2.0)),
        top_p=float(top_p) or 1.0,
        top_k=int(number("top_k", 0, -1, 2**31 - 1)),
    )


def fingerprint(model: Model, attention: str) -> str:
    """Another one whenever the same request and seed may be answered with another text."""
    device = jax.devices()[0]
    parts: list[Any] = [
        fingerprints(model.params),
        str(model.bundle),
        written_as(model.bundle, model.tokenizer),
        (attention, device.platform, device.device_kind, len(jax.devices())),
        (llava_mini_jax.__version__, jax.__version__),
    ]
    return f"fp_{hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]}"
