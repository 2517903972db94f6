"""THE table: every parameter's path here and its tensor's name in each published layout.

    "llm/layers/q_proj", layer 3  <-- TABLES, LAYOUTS -->  "model.layers.3.self_attn.q_proj.weight"

Both directions use it: import looks tensors up by name, export writes them under the name. Numbers
and their order are the same on both sides (output features first); shapes differ only by how axes
are grouped, and by a leading layer axis where layers are stacked.

Tensor names: docs/release.md, "Checkpoint files"; golden model.safetensors files.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator

from llava_mini_jax.models.llava_mini import LlavaMiniConfig
from llava_mini_jax.params import ParamSpec


def _pair(ours: str, theirs: str) -> dict[str, str]:
    """A kernel (or norm scale) and its bias."""
    first = "scale" if ours.endswith("norm") else "kernel"
    return {f"{ours}/{first}": f"{theirs}.weight", f"{ours}/bias": f"{theirs}.bias"}


VISION_LAYER = (
    _pair("attn_norm", "layer_norm1")
    | _pair("q_proj", "self_attn.q_proj")
    | _pair("k_proj", "self_attn.k_proj")
    | _pair("v_proj", "self_attn.v_proj")
    | _pair("o_proj", "self_attn.out_proj")
    | _pair("mlp_norm", "layer_norm2")
    | _pair("fc1", "mlp.fc1")
    | _pair("fc2", "mlp.fc2")
)

VISION = {
    "patch_embed": "embeddings.patch_embedding.weight",
    "patch_bias": "embeddings.patch_embedding.bias",
    "class_token": "embeddings.class_embedding",
    "position": "embeddings.position_embedding.weight",
    **_pair("pre_norm", "pre_layrnorm"),  # spelt so in every published CLIP
    **{f"layers/{o}": f"encoder.layers.{{}}.{t}" for o, t in VISION_LAYER.items()},
    **{f"unread_layers/{o}": f"encoder.layers.{{}}.{t}" for o, t in VISION_LAYER.items()},
    **_pair("unread_norm", "post_layernorm"),
}

LLAMA_LAYER = {
    "attn_norm": "input_layernorm.weight",
    "q_proj": "self_attn.q_proj.weight",
    "k_proj": "self_attn.k_proj.weight",
    "v_proj": "self_attn.v_proj.weight",
    "o_proj": "self_attn.o_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate_proj": "mlp.gate_proj.weight",
    "up_proj": "mlp.up_proj.weight",
    "down_proj": "mlp.down_proj.weight",
    **{f"{one}_bias": f"self_attn.{one}_proj.bias" for one in "qkv"},
    **{f"{one}_norm": f"self_attn.{one}_norm.weight" for one in "qk"},
}

LLAMA = {
    "embed_tokens": "embed_tokens.weight",
    "final_norm": "norm.weight",
    **{f"layers/{o}": f"layers.{{}}.{t}" for o, t in LLAMA_LAYER.items()},
}

PREFUSION = {f"layers/{o}": f"{{}}.{t}" for o, t in LLAMA_LAYER.items()}


def _packed(theirs: str) -> dict[str, str]:
    """torch's MultiheadAttention, which packs the three input projections into one tensor.

    "name#k/n" is the k-th of n equal parts of a tensor along its first axis.
    """
    inputs = {
        f"{name}/{ours}": f"{theirs}.in_proj_{kind}#{part}/3"
        for part, name in enumerate(("q_proj", "k_proj", "v_proj"))
        for ours, kind in (("kernel", "weight"), ("bias", "bias"))
    }
    return inputs | _pair("o_proj", f"{theirs}.out_proj")


def _mlp(ours: str, theirs: str) -> dict[str, str]:
    """Linear, activation, linear."""
    return _pair(f"{ours}/fc1", f"{theirs}.0") | _pair(f"{ours}/fc2", f"{theirs}.2")


def _under(module: str, inner: dict[str, str]) -> dict[str, str]:
    return {ours: f"{module}.{theirs}" for ours, theirs in inner.items()}


_RELEASE = _under(
    "compressor",
    {"query": "query", "position": "pos_embed"}
    | _pair("query_norm", "ln_q")
    | _pair("patch_norm", "ln_kv")
    | _packed("attn"),
)
_BERT = "vlm_att_encoder.bert"


def _bert_attention(ours: str, theirs: str) -> dict[str, str]:
    return (
        _pair(f"{ours}/q_proj", f"{theirs}.self.query")
        | _pair(f"{ours}/k_proj", f"{theirs}.self.key")
        | _pair(f"{ours}/v_proj", f"{theirs}.self.value")
        | _pair(f"{ours}/o_proj", f"{theirs}.output.dense")
        | _pair(f"{ours}/norm", f"{theirs}.output.LayerNorm")
    )


def _bert_mlp(ours: str, more: str) -> dict[str, str]:
    return (
        _pair(f"{ours}/fc1", f"intermediate{more}.dense")
        | _pair(f"{ours}/fc2", f"output{more}.dense")
        | _pair(f"{ours}/norm", f"output{more}.LayerNorm")
    )


_QFORMER_LAYER = (
    _bert_attention("attention", "attention")
    | _bert_attention("cross", "crossattention")
    | _bert_mlp("query_mlp", "_query")
    | _bert_mlp("text_mlp", "")
)
_LLAMA_VID = {
    "qformer/query": "vlm_att_query",
    "qformer/embed_tokens": f"{_BERT}.embeddings.word_embeddings.weight",
    "qformer/position": f"{_BERT}.embeddings.position_embeddings.weight",
    **_pair("qformer/norm", f"{_BERT}.embeddings.LayerNorm"),
    **{f"qformer/layers/{o}": f"{_BERT}.encoder.layer.{{}}.{t}" for o, t in _QFORMER_LAYER.items()},
    **_pair("picture_in", "vlm_att_bert_proj"),
    **_pair("picture_norm", "vlm_att_ln"),
    **_pair("query_out", "vlm_att_projector"),
    **_pair("key_proj", "vlm_att_key_projector"),
    **_pair("context_out", "vlm_att_val_projector"),
    **_mlp("projector", "mm_projector"),
}
# By kind, as each method's authors name their parts; kinds that are not here have no parameters.
COMPRESSORS = {
    # Ours: the authors' token is a row of an enlarged vocabulary.
    "voco": {"token": "voco_token"},
    "nested": {"query": "nested_compressor.query"},
    "similarity": {"query": _RELEASE["query"]},
    "multi_head": _RELEASE,
    "mqt": _under(
        "query_abstractor",
        {"query": "query", "position": "pos_embed", "into_llm": "proj"}
        | _pair("query_norm", "ln_q")
        | _pair("key_norm", "ln_k")
        | _pair("value_norm", "ln_v")
        | _packed("attn"),
    ),
    "token_packer": _under(
        "mm_projector",
        {"query_in": "q_proj_1.weight"}
        | _mlp("key_in", "k_proj_1")
        | _mlp("value_in", "v_proj_1")
        | _pair("query_norm", "ln_q_1")
        | _pair("key_norm", "ln_k_1")
        | _pair("value_norm", "ln_v_1")
        | _packed("clip_attn")
        | _mlp("into_llm", "mlp"),
    ),
    "llama_vid": _LLAMA_VID,
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a published format puts each component: prefixes, and the projector's two layers."""

    vision: str | None = None
    llm: str | None = None
    head: str | None = None
    projector: tuple[str, str] | None = None
    compressor: str | None = None
    prefusion: str | None = None


LAYOUTS = {
    # The release, and LLaVA-1.5's original format, which lacks its last two components.
    "release": Layout(
        vision="model.vision_tower.vision_tower.vision_model.",
        llm="model.",
        head="lm_head",
        projector=("model.mm_projector.0", "model.mm_projector.2"),
        compressor="model.",
        prefusion="model.prefusion_layers.",
    ),
    # LLaVA-1.5 as Hugging Face's own class publishes it, and as that class saves it since 4.52.
    "llava-hf": Layout(
        vision="vision_tower.vision_model.",
        llm="language_model.model.",
        head="language_model.lm_head",
        projector=("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
    ),
    "llava-hf-4.52": Layout(
        vision="model.vision_tower.vision_model.",
        llm="model.language_model.",
        head="lm_head",
        projector=("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"),
    ),
    "clip": Layout(vision="vision_model."),
    "llama": Layout(llm="model.", head="lm_head"),
}

# transformers 5.12 took this word out of the names that it writes for CLIP's vision model.
VISION_MODEL = "vision_model."


def as_written(layout: Layout, names: Iterable[str]) -> Layout:
    """The layout with the tower's prefix as `names` have it: with "vision_model." or without."""
    if layout.vision is None or any(name.startswith(layout.vision) for name in names):
        return layout
    return dataclasses.replace(layout, vision=layout.vision.removesuffix(VISION_MODEL))


TABLES = ("embed_tokens.weight", "lm_head.weight")  # a row for each token, in every layout

# Buffers and parts that the model does not use, in the layouts that have them.
IGNORED = (
    re.compile(r".*\.rotary_emb\.inv_freq"),
    re.compile(r".*\.position_ids"),
    re.compile(r"(text_model|text_projection|visual_projection)\..*|logit_(scale|bias)"),
    # SigLIP's pooling head.
    re.compile(r"(model\.)?(vision_tower\.)*(vision_model\.)?head\.(probe|\w+\..*)"),
)


def table(layout: Layout, cfg: LlavaMiniConfig) -> dict[str, str]:
    """{our path (stacked form): their name}, "{}" standing for the layer number."""
    names: dict[str, str] = {}

    def add(component: str, prefix: str | None, inner: dict[str, str]) -> None:
        if prefix is not None:
            names.update({f"{component}/{o}": prefix + t for o, t in inner.items()})

    add("vision", layout.vision, VISION)
    add("llm", layout.llm, LLAMA)
    add("llm", layout.head, {"lm_head": ".weight"})
    add("compressor", layout.compressor, COMPRESSORS.get(cfg.compressor.kind, {}))
    add("prefusion", layout.prefusion, PREFUSION)
    if layout.projector is not None:
        first, second = layout.projector
        if cfg.projector.kind == "linear":
            first = first.removesuffix(".0")
        names.update(_pair("projector/fc1", first) | _pair("projector/fc2", second))
    return names


@dataclasses.dataclass(frozen=True)
class Source:
    """One published tensor, or the `part`-th of `parts` equal pieces of it along its first axis."""

    name: str
    part: int = 0
    parts: int = 1


def sources(
    path: str, spec: ParamSpec, names: dict[str, str], read_vision_layers: int
) -> list[Source] | None:
    """The tensors that make up a parameter, one for each layer of a stacked leaf; None if unnamed.

    A path of an unrolled tree carries its layer number ("llm/layers/3/q_proj").
    """
    numbered = re.fullmatch(r"(.*?)/(\d+)/(.*)", path)
    key = f"{numbered[1]}/{numbered[3]}" if numbered else path
    if key not in names:
        return None
    first = read_vision_layers if key.startswith("vision/unread_layers/") else 0
    if numbered:
        layers: Iterator[int] = iter([int(numbered[2])])
    else:
        layers = iter(range(spec.shape[0] if spec.stacked else 1))
    return [_parse(names[key].replace("{}", str(first + layer))) for layer in layers]


def _parse(text: str) -> Source:
    name, _, piece = text.partition("#")
    if not piece:
        return Source(name)
    part, parts = piece.split("/")
    return Source(name, int(part), int(parts))
