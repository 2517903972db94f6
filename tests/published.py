"""Folders as other methods' code writes them: names, shapes and fields; weights of golden cases.

a plain LLaVA-1.5, tiny --config.json's fields, tensors--> that method's folder
a golden case's weights, in its authors' names, take the place of random ones
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

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


def vision(**sizes: Any) -> ClipConfig:
    return dataclasses.replace(tiny.VISION, **sizes)


def language(**sizes: Any) -> LlamaConfig:
    return dataclasses.replace(tiny.LLM, layers=1, **sizes)


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
