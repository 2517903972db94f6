"""Our own section of config.json, both ways: what Hugging Face's fields cannot say of a model.

Bundle --section_of--> {"model": {..}, "prompt": {..}, "images": {..}} --with_section--> Bundle
"""

import dataclasses
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from llava_mini_jax.config import Bundle
from llava_mini_jax.errors import InputError, short
from llava_mini_jax.json_fields import SECTION, Fields
from llava_mini_jax.models import compressors
from llava_mini_jax.models.compressors import CompressorConfig


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
        if part == "model" and "compressor" in changes:  # the only part of a part
            own = _compressor(bundle, changes["compressor"], f"{where}: {SECTION}.model")
            changes = {**changes, "compressor": own}
        for field, value in changes.items():
            if not isinstance(value, CompressorConfig):
                _check_field(parts[part], field, value, f"{where}: {SECTION}.{part}")
        parts[part] = dataclasses.replace(parts[part], **changes)
    return dataclasses.replace(bundle, **parts)


def _compressor(bundle: Bundle, said: Any, where: str) -> CompressorConfig:
    """The compressor as the section says; another method than the bundle's needs all its fields."""
    current = bundle.model.compressor
    if not isinstance(said, dict):
        raise InputError(f"{where}.compressor is {short(said)}, expected an object; correct it")
    kind = said.get("kind", current.kind)
    known = isinstance(kind, str) and kind in compressors.METHODS
    config = compressors.config_of(kind) if known else type(current)
    if isinstance(current, config):
        for field, value in said.items():
            _check_field(current, field, value, f"{where}.compressor")
        return dataclasses.replace(current, **said)
    hints = get_type_hints(config)
    fields = {name: said[name] for name in hints if name in said}
    if fields.keys() != hints.keys() or said.keys() != hints.keys():
        raise InputError(
            f'{where}.compressor is of kind "{kind}" with the fields {", ".join(said)}; expected '
            f"{', '.join(hints)}"
        )
    for name, value in said.items():
        fields[name] = _of_type(value, hints[name], f"{where}.compressor.{name}")
    return config(**fields)


def _of_type(value: Any, expected: Any, where: str) -> Any:
    """A json value as a config's field; lists of whole numbers are tuples there."""
    if get_origin(expected) is UnionType:  # a type or None
        if value is None:
            return None
        (expected,) = (one for one in get_args(expected) if one is not type(None))
    plain = get_origin(expected) is None
    fits = type(value) is expected if plain else _is_row(value)
    if not fits:
        word = expected.__name__ if plain else "whole numbers"
        raise InputError(f"{where} is {short(value)}, expected {word}; correct it")
    return value if plain else tuple(value)


def _is_row(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)


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
