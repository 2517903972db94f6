"""Other methods' published folders: which compressor a folder was trained with, or may be given.

    config.json's fields, names of tensors, the tokenizer --said_by--> a kind, or None: a LLaVA
    --compressor KIND,FIELD=VALUE --parse_asked--> Asked --.
                          kind, its authors' constants ----+--compressor_of--> CompressorConfig

What each method's code writes into a folder and builds from it, and which numbers it has built in,
was read in its authors' repository (docs/weights.md, "Other methods"). Methods that are trained
open from folders of theirs alone; those that need no training open on any LLaVA-1.5.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
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
from llava_mini_jax.models.llama import LlamaConfig
from llava_mini_jax.tensorfiles.lazy_tensor import LazyTensor

Tensors = Mapping[str, LazyTensor]
VOCO = "<voco>"  # the word that VoCo's authors add to the vocabulary


@dataclasses.dataclass(frozen=True)
class Asked:
    """What --compressor says: a method, and fields of its configuration as they were written."""

    kind: str
    options: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Source:
    """What a folder holds that a method's sizes are read from."""

    f: Fields  # of its config.json
    tensors: Tensors
    vision: ClipConfig
    llm: LlamaConfig
    words: Mapping[str, tuple[int, ...]]  # ids of texts that a method writes itself

    def shape(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """A tensor's; of one that is missing `default`, whose absence is told with all others."""
        tensor = self.tensors.get(name)
        return default if tensor is None or len(tensor.shape) != len(default) else tensor.shape


@dataclasses.dataclass(frozen=True)
class Method:
    fields: tuple[str, ...]  # of config.json, which only its authors' code writes
    prefix: str | None  # that its own tensors have in common
    constants: Callable[[Source], dict[str, Any]]  # its configuration's fields
    counts: Callable[[Fields], list[int]] | None = None  # of tokens, that it was trained with
    template: str | None = None  # of prompts; None: the language model's
    token: str | None = None  # that only its tokenizer has

    @property
    def signs(self) -> list[str]:
        """By which a folder of a model that was trained with it is known."""
        signs = [f'"{name}"' for name in self.fields]
        signs += [f'tensors "{self.prefix}..."'] * bool(self.prefix)
        return signs + [f'token "{self.token}"'] * bool(self.token)

    @property
    def trained(self) -> bool:
        return bool(self.signs)


def _mqt(source: Source) -> dict[str, Any]:
    f, (queries, _) = source.f, source.shape("model.query_abstractor.query", (256, 0))
    f.only("query_abstractor_type", "matry_query", because="the tokens are made in another way")
    # "second_stage" draws a number for every batch; asked without one the authors' code does too.
    said = f.values.get("num_visual_tokens")
    staged = said in (None, "first_stage", "second_stage")
    count = f.get("num_visual_tokens", str, None) if staged else f.size("num_visual_tokens")
    return dict(
        width=source.vision.width,
        out_width=source.llm.width,
        heads=16,
        queries=queries,
        count=queries if staged else count,
        norm_eps=1e-6,
    )


def _token_packer(source: Source) -> dict[str, Any]:
    return dict(
        width=source.vision.width,
        out_width=source.llm.width,
        heads=8,
        levels=(12, 16, 22, 23),
        # Built into the code of the first models, which therefore do not say it.
        scale=source.f.size("scale_factor", 2),
        norm_eps=1e-6,
    )


def _llama_vid(source: Source) -> dict[str, Any]:
    f, vision, bert = source.f, source.vision, "model.vlm_att_encoder.bert."
    kinds = ("qformer_pretrain", "qformer_pretrain_freeze", "qformer_pretrain_freeze_all")
    f.only("bert_type", *kinds, because="questions are read in another way")
    for name, kind in (("image_processor", str), ("max_token", int)):
        f.get(name, kind, None)  # a path to CLIP's steps; a length of its training
    vocabulary, width = source.shape(f"{bert}embeddings.word_embeddings.weight", (30523, 768))
    first = f"{bert}encoder.layer."
    layers = {name.removeprefix(first).split(".")[0] for name in source.tensors if first in name}
    return dict(
        width=vision.width,
        out_width=source.llm.width,
        content=_content(f, vision.grid),
        class_token=not vision.pre_norm,  # an EVA
        vision_norm_eps=1e-5,
        qformer_width=width,
        qformer_heads=12,
        qformer_layers=len(layers) or 12,
        qformer_mlp_width=source.shape(f"{first}0.intermediate.dense.weight", (3072, 0))[0],
        qformer_cross_every=2,
        qformer_cross_width=source.shape("model.vlm_att_ln.weight", (1408,))[0],
        qformer_queries=f.size("num_query", 32),
        qformer_vocabulary=vocabulary,
        qformer_positions=source.shape(f"{bert}embeddings.position_embeddings.weight", (512, 0))[0],
        qformer_norm_eps=1e-12,
    )


def _content(f: Fields, side: int) -> int:
    """Pooled tokens along one side, by LLaMA-VID's field: "mean", "grid:4", or null for all."""
    said = f.get("compress_type", str, None)
    if said is None:
        return side
    grid = said.removeprefix("grid:")
    if said != "mean" and (grid == said or not grid.isdecimal() or int(grid) < 2):
        raise f.wrong("compress_type", '"mean", "grid:N" with N from 2 on, or null')
    return 1 if said == "mean" else int(grid)


def _m3(source: Source) -> dict[str, Any]:
    return dict(count=max(_m3_counts(source.f)))


def _m3_counts(f: Fields) -> list[int]:
    name = "matryoshka_vis_token_scale"
    said = f.values.get(name)
    if not isinstance(said, list):
        return [f.size(name)]
    if not said or not all(type(count) is int and count > 0 for count in said):
        raise f.wrong(name, "the numbers of tokens that it was trained with")
    return f.get(name, list)


def _voco(source: Source) -> dict[str, Any]:
    return dict(
        count=2,
        token_id=source.words[VOCO][0],
        width=source.llm.width,
        between=source.words["\n"],
        variant="release",
    )


def _prumerge(source: Source) -> dict[str, Any]:
    # Its authors answer one picture a call, where their shared ratio is each picture's own.
    return dict(layer=source.vision.layers - 1, neighbours=32, ratio=0.0, variant="clean")


def _visionzip(source: Source) -> dict[str, Any]:
    return dict(layer=source.vision.used_layers - 1, dominant=54, contextual=10)


def _fastv(source: Source) -> dict[str, Any]:
    return dict(layer=2, keep=max(1, source.vision.grid**2 // 2), variant="mask")


PUBLISHED = {
    "mqt": Method(("query_abstractor_type", "num_visual_tokens"), "model.query_abstractor.", _mqt),
    "token_packer": Method(("scale_factor",), "model.mm_projector.clip_attn.", _token_packer),
    "llama_vid": Method(("bert_type", "num_query", "compress_type"), "model.vlm_att_", _llama_vid),
    "m3": Method(("matryoshka_vis_token_scale",), None, _m3, _m3_counts),
    "voco": Method((), None, _voco, template="voco_v1", token=VOCO),
    "prumerge": Method((), None, _prumerge),
    "prumerge_plus": Method((), None, _prumerge),
    "visionzip": Method((), None, _visionzip),
    "fastv": Method((), None, _fastv),
}
TRAINING_FREE = tuple(kind for kind, method in PUBLISHED.items() if not method.trained)


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
                f"--compressor {text}: {item!r} is no option of its own; give FIELD=VALUE once for"
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
    # As a piece of text between two pictures' marks is read, without a bos.
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
        raise InputError(f"{f.where} has fields of several methods: {told}; take the wrong one out")
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
