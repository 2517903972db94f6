"""The files beside a tokenizer's vocabulary: special tokens, tokens added later, a chat template.

    tokenizer_config.json, special_tokens_map.json --> special tokens by name, options
    tokenizer_config.json's added_tokens_decoder, added_tokens.json --> tokens by id
    chat_template.jinja and others (data/text/chat_template.py) --> the chat template

What is not as it should be is told with the file's and the field's name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_mini_jax.data.text import chat_template
from llava_mini_jax.errors import InputError

# What data/text/tokenizer.py reads, by the beginnings of names.
TOKENIZER_FILES = (
    "tokenizer",
    "special_tokens_map",
    "added_tokens",
    "chat_template",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
NAMED = tuple(f"{word}_token" for word in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))
# What transformers' LlamaTokenizer takes where a folder names none.
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@dataclass(frozen=True)
class TokenizerFiles:
    where: str  # the folder
    named: Mapping[str, str]  # "eos_token": "</s>"
    declared: Mapping[int, tuple[str, Mapping[str, bool]]]  # id: content, AddedToken's flags
    options: Mapping[str, Any]  # of transformers' shell around the tokenizer
    chat_template: str | dict[str, str] | None
    class_name: str | None  # transformers'
    add_bos: bool  # in front of every text, where there is no tokenizer.json to say it

    def special_tokens(self, backend: Any) -> dict[str, str]:
        """Those of `named` that are tokens of the vocabulary.

        One that is not there cannot be written or generated: transformers would add it, with an
        id for which the model may have no row.
        """
        return {n: t for n, t in self.named.items() if backend.token_to_id(t) is not None}

    def add_declared(self, backend: Any) -> None:
        """Adds the tokens that the other files know and tokenizer.json does not.

        Raises InputError where they say another id than tokenizer.json has or would give.
        """
        from tokenizers import AddedToken

        for number, (content, flags) in sorted(self.declared.items()):
            if backend.token_to_id(content) is None:
                backend.add_tokens([AddedToken(content, **flags)])
            found = backend.token_to_id(content)
            if found != number:
                raise InputError(
                    f'{self.where}: "{content}" has the id {number} in tokenizer_config.json or'
                    f" added_tokens.json, but {found} by tokenizer.json; correct the wrong one"
                )


def read_files(folder: Path) -> TokenizerFiles:
    """All that a folder says beside its vocabulary; raises InputError for values of wrong types."""
    config = _object(folder, "tokenizer_config.json")
    declared = _declared(config.get("added_tokens_decoder"), folder / "tokenizer_config.json")
    named = _named(config, folder / "tokenizer_config.json")
    # As transformers has it: the older files count where there are no tokens by id.
    if not declared:
        older = _object(folder, "special_tokens_map.json")
        named |= _named(older, folder / "special_tokens_map.json")
        declared = _added(_object(folder, "added_tokens.json"), folder, set(named.values()))
    class_name = config.get("tokenizer_class")
    if class_name is not None and not isinstance(class_name, str):
        raise _wrong(folder / "tokenizer_config.json", "tokenizer_class", class_name, "a name")
    if class_name is None or class_name.startswith("Llama"):
        named = {**{n: t for n, t in _LLAMA.items() if n not in config}, **named}
    return TokenizerFiles(
        where=str(folder),
        named=named,
        declared=declared,
        options=_options(config, folder / "tokenizer_config.json"),
        chat_template=chat_template.find(folder, config),
        class_name=class_name,
        add_bos=config.get("add_bos_token") is not False,  # as LLaMA's own code does
    )


def chat_template_of(folder: Path) -> str | None:
    """The text of a folder's own chat template; None if it has none that is the default."""
    found = chat_template.find(folder, _object(folder, "tokenizer_config.json"))
    return found if isinstance(found, str) else None


def _object(folder: Path, name: str) -> dict[str, Any]:
    from llava_mini_jax.json_fields import read_json

    if not (folder / name).is_file():
        return {}
    try:
        return read_json(folder / name)
    except (OSError, RecursionError) as error:
        raise InputError(f"{folder / name} cannot be read ({error}): restore the file") from error


def _named(values: Mapping[str, Any], path: Path) -> dict[str, str]:
    found = {}
    for name in NAMED:
        if (value := values.get(name)) is not None:
            found[name] = _content(value, path, name)
    return found


def _content(value: Any, path: Path, field: str) -> str:
    """Of a token that is its text, or an object with it."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str) or not _is_unicode(text):
        raise _wrong(path, field, value, 'a text, or {"content": text}')
    return text


def _is_unicode(text: str) -> bool:
    """json may say half of a character, which no tokenizer reads."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _declared(values: Any, path: Path) -> dict[int, tuple[str, dict[str, bool]]]:
    if values is None:
        return {}
    field = "added_tokens_decoder"
    if not isinstance(values, dict):
        raise _wrong(path, field, values, 'an object of {"ID": {"content": text}}')
    found = {}
    for number, token in values.items():
        if not number.isdecimal() or not isinstance(token, dict):
            raise _wrong(path, f"{field}.{number}", token, 'an id with {"content": text}')
        content = _content(token, path, f"{field}.{number}")
        flags = {n: token[n] for n in _FLAGS if n in token}
        if not all(isinstance(flag, bool) for flag in flags.values()):
            raise _wrong(path, f"{field}.{number}", token, f"true or false for {_FLAGS}")
        found[int(number)] = (content, flags)
    return found


_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _added(
    values: Mapping[str, Any], folder: Path, special: set[str]
) -> dict[int, tuple[str, dict[str, bool]]]:
    found = {}
    for content, number in values.items():
        good = isinstance(number, int) and not isinstance(number, bool) and number >= 0
        if not good or not _is_unicode(content):
            raise _wrong(folder / "added_tokens.json", content, number, "an id")
        flags = {"special": content in special, "normalized": content not in special}
        found[number] = (content, flags)
    return found


def _options(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    options = {}
    for name, kinds, expected in (
        ("model_max_length", (int, float), "a number"),
        ("padding_side", (str,), '"right" or "left"'),
        ("add_bos_token", (bool,), "true or false"),
        ("add_eos_token", (bool,), "true or false"),
    ):
        value = config.get(name)
        if value is None:
            continue
        good = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if not good or (name == "padding_side" and value not in ("right", "left")):
            raise _wrong(path, name, value, expected)
        # The other two are what tokenizer.json's post-processor says.
        if name in ("model_max_length", "padding_side"):
            options[name] = value
    return options


def _wrong(path: Path, field: str, value: Any, expected: str) -> InputError:
    return InputError(f'{path}: "{field}" is {value!r:.80}, expected {expected}; correct it')
