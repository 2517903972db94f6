"""Folders as other methods' code writes them: names, shapes and fields; weights of golden cases.

a plain LLaVA-1.5, tiny --config.json's fields, tensors--> that method's folder
a golden case's weights, in its authors' names, take the place of random ones
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from llava_mini_jax import config as configs
from llava_mini_jax.models.clip import ClipConfig
from llava_mini_jax.models.llama import LlamaConfig
from llava_mini_jax.reproduce.check import read_case
from llava_mini_jax.reproduce.compressor_cases import Case
from llava_mini_jax.tensorfiles.files import open_tensors
from llava_mini_jax.weights import names
from llava_mini_jax.weights.export_hf import published_tensors
from llava_mini_jax.weights.export_json import llama_json
from tests import tiny
from tests.data.toy_tokenizers import add_bos, add_specials, as_fast

CASES = Path(__file__).parent / "golden" / "compressors"
# What every trainer of LLaVA's writes beside the language model's fields.
LLAVA = dict(
    model_type="llava_llama",
    architectures=["LlavaLlamaForCausalLM"],
    mm_vision_tower="clip",
    mm_projector_type="mlp2x_gelu",
    mm_vision_select_layer=-2,
    mm_vision_select_feature="patch",
    mm_use_im_start_end=False,
    mm_use_im_patch_token=False,
    use_mm_proj=True,
    image_aspect_ratio="pad",
    freeze_mm_mlp_adapter=False,
    tune_mm_mlp_adapter=False,
    mm_projector_lr=None,
    tokenizer_padding_side="right",
    tokenizer_model_max_length=2048,
    eos_token_id=2,
    pad_token_id=0,
)


def case(name: str) -> Case:
    return Case(CASES / name, *read_case(CASES / name))


def weights(name: str, prefix: str) -> dict[str, np.ndarray]:
    """A case's, with what a checkpoint has in front of their names."""
    file = CASES / name / "weights.safetensors"
    return {prefix + n: tensor.read() for n, tensor in open_tensors(file).items()}


def eva(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A model's tensors with its tower as LLaMA-VID's code names it; keys lose their biases."""
    found = {}
    front = "model.vision_tower.vision_tower."
    for name, array in tensors.items():
        own = name.removeprefix(f"{front}vision_model.")
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)", own)
        if own == name:
            found[name] = array
        elif layer is None:
            new = {
                "embeddings.class_embedding": "cls_token",
                "embeddings.position_embedding.weight": "pos_embed",
                "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
                "embeddings.patch_embedding.bias": "patch_embed.proj.bias",
            }.get(own)
            if new:
                axes = {"cls_token": (1, 1), "pos_embed": (1,)}.get(new, ())
                found[front + new] = array.reshape(*axes, *array.shape)
        elif layer[2].startswith("self_attn.q_proj.weight"):
            parts = [tensors[name.replace("q_proj", f"{one}_proj")] for one in "qkv"]
            found[f"{front}blocks.{layer[1]}.attn.qkv.weight"] = np.concatenate(parts)
        elif not re.match(r"self_attn\.([kv]_proj\.weight|k_proj\.bias)", layer[2]):
            new = layer[2].replace("layer_norm", "norm").replace("self_attn.out_proj", "attn.proj")
            new = re.sub(r"self_attn\.([qv])_proj\.bias", r"attn.\1_bias", new)
            found[f"{front}blocks.{layer[1]}.{new}"] = array
    return found


def vision(**sizes: Any) -> ClipConfig:
    return dataclasses.replace(tiny.VISION, **sizes)


def language(**sizes: Any) -> LlamaConfig:
    return dataclasses.replace(tiny.LLM, **{"layers": 1, **sizes})


def plain(llm: LlamaConfig, tower: ClipConfig) -> dict[str, np.ndarray]:
    """The tensors of a LLaVA-1.5, its tower among them."""
    model = configs.build(
        llm, tower, "paper", compressor="none", prefusion_layers=0, compute_dtype="float32"
    )
    return dict(published_tensors(tiny.weights(model), model, names.LAYOUTS["release"]))


def write(
    place: Path,
    tensors: dict[str, np.ndarray],
    llm: LlamaConfig,
    tower: ClipConfig,
    *,
    voco: int | None = None,
    **fields: Any,
) -> Path:
    """A model's folder below `place`, the tower's configuration beside it.

    `voco` is the id of "<voco>" in its tokenizer, which knows letters.
    """
    folder = place / "model"
    folder.mkdir(parents=True)
    (place / "clip").mkdir()
    text = llama_json(llm) | LLAVA | dict(hidden_size=llm.width) | fields
    (folder / "config.json").write_text(json.dumps(text))
    (place / "clip" / "config.json").write_text(json.dumps(clip_json(tower)))
    save_file(tensors, folder / "model.safetensors")
    letters(llm.vocab_size, voco).save_pretrained(folder)
    return folder


def bert(place: Path) -> Path:
    """A folder as bert-base-uncased's: small letters, a token in front of a text and one behind."""
    ids = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}
    ids |= {letter: 4 + n for n, letter in enumerate("abcdefghijklmnopqrstuvwxyz?. ")}
    backend = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    around = [(word, ids[word]) for word in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, around)
    made = as_fast(backend, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
                   sep_token="[SEP]")  # fmt: skip
    made.save_pretrained(place / "bert-base-uncased")
    return place / "bert-base-uncased"


def letters(size: int, voco: int | None) -> Any:
    """A token a character; line breaks have LLaMA's id."""
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2, "\n": 13}
    if voco is not None:
        ids["<voco>"] = voco
    free = (number for number in range(3, size) if number not in ids.values())
    known = " abcdefghijklmnopqrstuvwxyz:?.ATUSERIN"
    ids |= dict(zip(known, free, strict=False))
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    add_specials(backend, [word for word in ("<s>", "</s>", "<voco>") if word in ids])
    add_bos(backend, "<s>")
    return as_fast(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def clip_json(tower: ClipConfig) -> dict[str, Any]:
    return dict(
        model_type="clip_vision_model",
        hidden_size=tower.width,
        intermediate_size=tower.mlp_width,
        num_hidden_layers=tower.layers,
        num_attention_heads=tower.heads,
        image_size=tower.image_size,
        patch_size=tower.patch_size,
        layer_norm_eps=tower.norm_eps,
        hidden_act=tower.activation,
    )
