"""Which compressor a published folder was trained with, or may be given.

    config.json's fields, names of tensors, the tokenizer --said_by--> a kind, or None: a LLaVA
    --compressor KIND,FIELD=VALUE --parse_asked--> Asked --.
              kind, its authors' numbers (method_folders) -+--compressor_of--> CompressorConfig

Methods that are trained open from folders of theirs alone; those that need no training open on any
LLaVA-1.5.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from llava_mini_jax.data.text.tokenizer import load_tokenizer
from llava_mini_jax.data.text.tokenizer_files import TOKENIZER_FILES
from llava_mini_jax.errors import InputError
from llava_mini_jax.json_fields import Fields
from llava_mini_jax.models import compressors
from llava_mini_jax.models.clip import ClipConfig
from llava_mini_jax.models.compressors import CompressorConfig
from llava_mini_jax.weights.method_folders import PUBLISHED, TRAINING_FREE, Source


@dataclasses.dataclass(frozen=True)
class Asked:
    """What --compressor says: a method, and fields of its configuration as they were written."""

    kind: str
    options: Mapping[str, str]


def parse_asked(text: str) -> Asked:
    """ "visionzip,dominant=54,contextual=10": a method, and fields of its configuration.

    Raises InputError for what is unknown, or given twice.
    """
    kind, *rest = text.split(",")
    if kind not in PUBLISHED:
        raise InputError(
            f'--compressor {text}: the method "{kind}" is unknown; use one of'
            f" {', '.join(PUBLISHED)}"
        )
    known = [name for name in get_type_hints(compressors.config_of(kind)) if name != "kind"]
    options: dict[str, str] = {}
    for item in rest:
        name, sign, value = item.partition("=")
        if not sign or name not in known or name in options:
            raise InputError(
                f"--compressor {text}: {item!r} is not a valid option; give FIELD=VALUE once for"
                f" each of {', '.join(known)}"
            )
        options[name] = value
    return Asked(kind, options)


def own_words(folder: Path) -> dict[str, tuple[int, ...]]:
    """Ids of the texts that a method writes into prompts itself, by the folder's tokenizer.

    Empty where no tokenizer has a word of a method's: then none is loaded.
    """
    tokens = [method.token for method in PUBLISHED.values() if method.token]
    files = [path for path in folder.iterdir() if path.name.startswith(TOKENIZER_FILES)]
    texts = [path.read_bytes() for path in files if path.is_file()]
    if not any(f'"{token}"'.encode() in text for token in tokens for text in texts):
        return {}
    backend = load_tokenizer(folder).backend_tokenizer
    ids = {token: backend.token_to_id(token) for token in tokens}
    words = {token: (number,) for token, number in ids.items() if number is not None}
    # As a piece of text between two images' marks is read, without a bos.
    return words | {"\n": tuple(backend.encode("\n", add_special_tokens=False).ids)}


def said_by(f: Fields, tensors: Iterable[str], words: Iterable[str]) -> str | None:
    """The method that a published folder was trained with; None of a LLaVA, and a LLaVA-Mini.

    Fields of config.json name it, else its own tensors do. Raises InputError for two at once.
    """
    by_field = {
        kind: name
        for kind, method in PUBLISHED.items()
        for name in reversed(method.fields)
        if f.values.get(name) is not None
    }
    by_field |= {kind: m.token for kind, m in PUBLISHED.items() if m.token and m.token in words}
    if len(by_field) > 1:
        told = ", ".join(f'"{name}" ({kind})' for kind, name in by_field.items())
        raise InputError(f"{f.where} has fields of several methods: {told}; remove the wrong one")
    if by_field:
        return next(iter(by_field))
    for kind, method in PUBLISHED.items():
        if method.prefix and any(name.startswith(method.prefix) for name in tensors):
            return kind
    return None


def refuse_other(where: str, said: str | None, asked: Asked | None) -> None:
    """InputError where a method is asked for that the folder was not trained with."""
    if asked is None or asked.kind == said:
        return
    if said is not None:
        raise InputError(
            f"{where} describes a model that was trained with {said}, and not with {asked.kind}:"
            f" leave out --compressor {asked.kind}, or give a folder that was"
        )
    method = PUBLISHED[asked.kind]
    if method.trained:
        raise InputError(
            f"{where} describes a model that was not trained with {asked.kind} (it has no"
            f" {', no '.join(method.signs)}): give a folder that was, or a method that needs no"
            f" training ({', '.join(TRAINING_FREE)})"
        )


def compressor_of(kind: str, source: Source, asked: Asked | None) -> CompressorConfig:
    """The configuration of a method in this folder: its authors' constants, then what is asked.

    Raises InputError for values that the method, or this tower, cannot have.
    """
    method = PUBLISHED[kind]
    own = compressors.config_of(kind)(**method.constants(source))
    config: Any = with_options(own, asked, source.vision)
    trained = None if method.counts is None else method.counts(source.f)
    if trained is not None and config.count not in trained:
        raise InputError(
            f"--compressor {kind},count={config.count}: the model of {source.f.where} was trained"
            f" with {', '.join(map(str, trained))} tokens; give one of these"
        )
    return config


def with_options(
    config: CompressorConfig, asked: Asked | None, vision: ClipConfig
) -> CompressorConfig:
    """`config` with the fields that --compressor gives."""
    if asked is None or not asked.options:
        return config
    hints = get_type_hints(type(config))
    given = {
        name: _value(f"--compressor {asked.kind},{name}={text}", text, hints[name])
        for name, text in asked.options.items()
    }
    try:
        changed = dataclasses.replace(config, **given)
        compressors.tokens(changed, vision.grid)
    except ValueError as error:
        told = ",".join((asked.kind, *(f"{n}={v}" for n, v in asked.options.items())))
        raise InputError(f"--compressor {told}: {error}") from error
    return changed


def _value(where: str, text: str, hint: Any) -> Any:
    """An option's text as its field's type; rows of numbers are written 12+16+22+23."""
    if get_origin(hint) is UnionType:
        (hint,) = (one for one in get_args(hint) if one is not type(None))
    try:
        if hint is bool:
            return {"true": True, "false": False}[text]
        if get_origin(hint) is tuple:
            return tuple(int(number) for number in text.split("+"))
        if hint is float and "/" in text:
            over, under = text.split("/")
            return float(over) / float(under)
        return hint(text)
    except (ValueError, KeyError, ZeroDivisionError):
        word = "whole numbers, as 1+2" if get_origin(hint) is tuple else hint.__name__
        raise InputError(f"{where}: expected {word}") from None
