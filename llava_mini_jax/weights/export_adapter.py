"""What a stage with LoRA has learnt, as a folder that PEFT and LLaVA know: adapters.py's inverse.

LoraWeights --names.py--> adapter_model.safetensors   X.lora_A.weight, X.lora_B.weight
others that are trained --> non_lora_trainables.bin   whole tensors
Bundle --export_json.py--> config.json and its siblings; adapter_config.json names the base
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from llava_mini_jax import distributed
from llava_mini_jax import params as param_tree
from llava_mini_jax.config import Bundle
from llava_mini_jax.errors import InputError
from llava_mini_jax.models import llava_mini
from llava_mini_jax.models.llava_mini import LlavaMini
from llava_mini_jax.models.lora import LoraConfig, is_lora, with_changes
from llava_mini_jax.tensorfiles.files import open_tensors
from llava_mini_jax.tensorfiles.save_torch import save_torch
from llava_mini_jax.weights import adapters, names
from llava_mini_jax.weights.export_hf import published_tensors, written_beside
from llava_mini_jax.weights.export_json import config_files

LAYOUT = names.LAYOUTS["release"]


def export_adapter(
    params: LlavaMini,
    bundle: Bundle,
    folder: Path,
    *,
    lora: LoraConfig,
    trainable: Sequence[str],
    base: str,
    place: Path | None,
    tokenizer: Any,
) -> None:
    """Writes an adapter's folder; nothing is left behind if it fails half-way.

    `trainable` are the path patterns of the stage. `base` is the model that the change belongs to,
    as adapter_config.json shall name it (a hub name, or a folder, which may be seen from the new
    one), and `place` where it lies; without it nothing is said of the base's numbers.
    """
    found = dict(lora_tensors(params, bundle, lora))
    modules = sorted({name.rpartition(".lora_")[0] for name in found})
    with written_beside(folder) as work:
        tokenizer.save_pretrained(work)
        for name, content in config_files(bundle, "release").items():
            _write(work / name, content)
        _write(work / adapters.CONFIG, _config(lora, base, modules))
        save_file(
            {adapters.PREFIX + name: array for name, array in found.items()},
            work / adapters.WEIGHTS[0],
            metadata={"format": "pt"},
        )
        (work / adapters.WEIGHTS[0]).chmod(0o644)  # the library lets its owner alone read it
        whole = {adapters.PREFIX + n: a for n, a in whole_tensors(params, bundle, trainable)}
        if whole:
            save_torch(work / adapters.WHOLE, whole)
        if place is not None:
            _write(work / adapters.BASE, {"sha256": adapters.digest(open_tensors(place))})


def refuse_base(folder: Path) -> None:
    """InputError for a folder that no adapter which is written here can belong to."""
    if adapters.is_adapter(folder):
        how = f"is an adapter itself: merge it first (llava-mini convert {folder} DST --merge)"
    elif not any(name.startswith(f"{LAYOUT.llm}layers.") for name in open_tensors(folder)):
        how = f"has other names of tensors: rewrite it first (llava-mini convert {folder} DST)"
    else:
        return
    raise InputError(f"lora cannot start from {folder}, which {how}")


def take_part(
    params: LlavaMini, bundle: Bundle, lora: LoraConfig, trainable: Sequence[str]
) -> None:
    """The part of the other processes while the first one writes."""
    for _ in (*lora_tensors(params, bundle, lora), *whole_tensors(params, bundle, trainable)):
        pass


def lora_tensors(
    params: LlavaMini, bundle: Bundle, lora: LoraConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """(PEFT's name without its prefix, array) of both factors of every changed weight."""
    spec = with_changes(llava_mini.spec(bundle.model), lora)
    if isinstance(params.llm.layers, tuple):
        spec = llava_mini.unrolled(spec)
    specs = param_tree.paths(spec)
    table = names.table(LAYOUT, bundle.model)
    for path, leaf in param_tree.paths(params).items():
        weight, _, factor = path.rpartition("/lora_")
        if not weight:
            continue
        own, base = specs[path], specs[f"{weight}/base"]
        sources = names.sources(weight, base, table, bundle.model.vision.used_layers)
        assert sources is not None  # the release's layout has all layers
        # The rank stands first in A and last in B; whatever is on the other side is one axis.
        sizes = own.shape[own.stacked :]
        shape = (sizes[0], -1) if factor == "a" else (-1, sizes[-1])
        for layer, source in enumerate(sources):
            array = distributed.fetch(leaf[layer] if own.stacked else leaf).reshape(shape)
            module = source.name.removesuffix(".weight")
            yield f"{module}.lora_{factor.upper()}.weight", array


def whole_tensors(
    params: LlavaMini, bundle: Bundle, trainable: Sequence[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """(published name, array) of what is trained and is no adapter."""
    plain = jax.tree.map(lambda leaf: None if is_lora(leaf) else leaf, params, is_leaf=is_lora)
    trained, _ = param_tree.split(plain, lambda path: param_tree.matches(path, trainable))
    return published_tensors(trained, bundle.model, LAYOUT)


def _config(lora: LoraConfig, base: str, modules: list[str]) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.effective_alpha,
        "lora_dropout": 0.0,
        # By their whole names: the ends alone would mean the tower's layers, too.
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
