"""Other methods' published folders: by what each is known, and numbers built into its code.

    kind --PUBLISHED--> Method: fields of config.json, tensors, a token that such folders have
                          '-- constants(Source) --> its configuration: read from fields and shapes,
                                                    or built into the authors' code

Read in each method's repository (docs/weights.md, "Other methods").
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from llava_mini_jax.json_fields import Fields
from llava_mini_jax.models.clip import ClipConfig
from llava_mini_jax.models.llama import LlamaConfig
from llava_mini_jax.tensorfiles.lazy_tensor import LazyTensor

Tensors = Mapping[str, LazyTensor]
VOCO = "<voco>"  # the word that VoCo's authors add to the vocabulary


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
    # Its authors answer one image a call, where their shared ratio is each image's own.
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
