"""The parts of a compressor's golden case: its model, weights in their authors' names, gradients.

case.json --tower, model--> LlavaMiniConfig --load--> the parts of a model that the case has
objective(params) --gradients--> {"grad/" + the authors' name: array}
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_mini_jax import config as configs
from llava_mini_jax.models import clip
from llava_mini_jax.models.clip import ClipConfig
from llava_mini_jax.models.compressors import CompressorConfig
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.models.seen import Seen
from llava_mini_jax.tensorfiles.files import open_tensors
from llava_mini_jax.weights import names
from llava_mini_jax.weights.export_hf import published_tensors
from llava_mini_jax.weights.import_hf import Published, load_tree

LAYOUT = names.Layout(vision="vision_tower.vision_model.", compressor="")


@dataclasses.dataclass(frozen=True)
class Case:
    folder: Path
    about: dict[str, Any]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]

    @property
    def config(self) -> dict[str, Any]:
        return self.about["config"]


def model(compressor: CompressorConfig, vision: ClipConfig, out_width: int) -> LlavaMiniConfig:
    """A model around a case's compressor; of its language model only the width is real."""
    llm = dataclasses.replace(configs.VICUNA_7B, width=out_width)
    return configs.build(
        llm, vision, "paper", compressor=compressor, prefusion_layers=0, compute_dtype="float32"
    )


def tower(sizes: dict[str, Any]) -> ClipConfig:
    """The CLIP of a case, whose json has Hugging Face's names."""
    return dataclasses.replace(
        configs.CLIP_L_336,
        image_size=sizes["image_size"],
        patch_size=sizes["patch_size"],
        width=sizes["hidden_size"],
        mlp_width=sizes["intermediate_size"],
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        norm_eps=sizes["layer_norm_eps"],
        activation=sizes["hidden_act"],
    )


def load(case: Case, spec: LlavaMini, cfg: LlavaMiniConfig, prefix: str = "") -> LlavaMini:
    """The parameters of a part of a model; `prefix`: what the case leaves out of its names."""
    file = case.folder / "weights.safetensors"
    tensors = {prefix + name: tensor for name, tensor in open_tensors(file).items()}
    folder = Published(str(file), tensors, LAYOUT)
    return load_tree(spec, cfg, [folder], dtype="float32", narrow=None)


def only(kind: type, **parts: Any) -> Any:
    """A struct of parameters, or of their specs, that has these parts alone."""
    return kind(**(dict.fromkeys((f.name for f in dataclasses.fields(kind)), None) | parts))


def gradients(
    case: Case,
    params: LlavaMini,
    cfg: LlavaMiniConfig,
    objective: Callable[[LlavaMini], jax.Array],
    prefix: str = "",
) -> dict[str, np.ndarray]:
    """Of a case's compressor, by the case's names."""

    def of_compressor(compressor: Any) -> jax.Array:
        return objective(dataclasses.replace(params, compressor=compressor))

    found = only(LlavaMini, compressor=jax.jit(jax.grad(of_compressor))(params.compressor))
    return {
        f"grad/{name.removeprefix(prefix)}": array
        for name, array in published_tensors(found, cfg, LAYOUT)
    }


def pictures(case: Case) -> jax.Array:
    """[I, Y, X, C] of a case's [I, C, Y, X]."""
    return jnp.asarray(case.inputs["images"].transpose(0, 2, 3, 1))


def look(params: LlavaMini, case: Case, cfg: LlavaMiniConfig) -> Seen:
    reads = cfg.declared.reads
    see = jax.jit(lambda tower, pixels: clip.look(tower, pixels, cfg.vision, cfg.dtype, reads))
    return see(params.vision, pictures(case))
