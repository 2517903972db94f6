"""Our own section of config.json, both ways: what Hugging Face's fields cannot say of a model.

Bundle --section_of--> {"model": {..}, "prompt": {..}, "images": {..}} --with_section--> Bundle
"""

import dataclasses
from typing import Any

from llava_mini_jax.config import Bundle
from llava_mini_jax.errors import InputError, short
from llava_mini_jax.json_fields import SECTION, Fields


def with_section(bundle: Bundle, f: Fields) -> Bundle:
    """The bundle as the section of its config.json (`f`) says; an unknown switch is an error."""
    section, where = f.get(SECTION, object, None), f.where
    if section is None:
        return bundle
    if not isinstance(section, dict):
        raise InputError(f'{where}: "{SECTION}" is {section!r}, expected an object')
    parts = {"model": bundle.model, "prompt": bundle.prompt, "images": bundle.images}
    for part, changes in section.items():
        if part not in parts or not isinstance(changes, dict):
            raise InputError(
                f'{where}: "{SECTION}" has an unknown part "{part}"; known: {", ".join(parts)}'
            )
        for field, value in changes.items():
            _check_field(parts[part], field, value, f"{where}: {SECTION}.{part}")
        if "compressor" in changes:  # the only part of a part
            compressor = dataclasses.replace(bundle.model.compressor, **changes["compressor"])
            changes = {**changes, "compressor": compressor}
        parts[part] = dataclasses.replace(parts[part], **changes)
    return dataclasses.replace(bundle, **parts)


def _check_field(config: Any, field: str, value: Any, where: str) -> None:
    known = {f.name for f in dataclasses.fields(config)}
    if field not in known:
        raise InputError(
            f'{where} has the unknown field "{field}"; known: {", ".join(sorted(known))}'
        )
    current = getattr(config, field)
    if isinstance(value, dict) and dataclasses.is_dataclass(current):
        for inner, inner_value in value.items():
            _check_field(current, inner, inner_value, f"{where}.{field}")
    elif type(value) is not type(current):
        expected = type(current).__name__
        raise InputError(f"{where}.{field} is {short(value)}, expected {expected}; correct it")
    elif isinstance(value, int | float) and not 0 <= value < 2**31:
        raise InputError(f"{where}.{field} is {short(value)}, expected a number from 0 on")


def section_of(bundle: Bundle) -> dict[str, Any]:
    """What the release's own config.json fields cannot say about a bundle."""
    model = bundle.model
    return {
        "model": {
            "compressor": dataclasses.asdict(model.compressor),
            "compress": model.compress,
            "fuse_compressed": model.fuse_compressed,
            "detach_text": model.detach_text,
            "prefusion_layers": model.prefusion_layers,
            "inside_layers": model.inside_layers,
        },
        "prompt": dataclasses.asdict(bundle.prompt),
        "images": {
            "aspect": bundle.images.aspect,
            "split": bundle.images.split,
            "repeat_whole": bundle.images.repeat_whole,
        },
    }
