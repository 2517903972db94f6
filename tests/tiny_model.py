"""A complete model folder with tiny random weights, for tests that go through files."""

import dataclasses
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

from llava_mini_jax import config as configs
from llava_mini_jax.data.digits.pages import build_tokenizer
from llava_mini_jax.models.compressors.nested import NestedConfig
from llava_mini_jax.models.llava_mini import LlavaMini
from llava_mini_jax.weights.export_hf import export_model
from llava_mini_jax.weights.export_json import llama_json
from tests import tiny


def bundle(dialect: str, positions: int = 256) -> configs.Bundle:
    """ "paper", "release", "llava-1.5" or "nested" (the paper's, with 0, 1, 4, 9 or 16 tokens); one
    layer of everything, so that it compiles quickly."""
    tokenizer = build_tokenizer()
    llm = dataclasses.replace(
        tiny.LLM, vocab_size=len(tokenizer), layers=1, max_positions=positions
    )
    depth = {} if dialect == "llava-1.5" else {"prefusion_layers": 1}
    vision = dataclasses.replace(tiny.VISION, layers=2)
    if dialect == "nested":
        counts = (0, 1, 4, 9, 16)
        own = NestedConfig(way="separate", width=llm.width, counts=counts, count=1)
        model = tiny.model("paper", llm, vision, compressor=own, **depth)
    else:
        model = tiny.model(dialect, llm, vision, grid=1, **depth)
    release = dialect == "release"
    return configs.Bundle(
        model=model,
        images=configs.image_config("release" if release else "paper", model.vision),
        prompt=configs.prompt_config("release" if release else "paper", "vicuna_v1", positions),
        eos_ids=(tokenizer.eos_token_id,),
        pad_id=tokenizer.pad_token_id,
    )


def weights(config: configs.Bundle) -> LlavaMini:
    """Weights that never say a special token, so that answers are as long as they may be."""
    params = tiny.weights(config.model)
    assert params.llm.lm_head is not None
    lm_head = np.array(params.llm.lm_head)
    lm_head[build_tokenizer().all_special_ids] = 0
    return dataclasses.replace(params, llm=dataclasses.replace(params.llm, lm_head=lm_head))


def folder(dialect: str, positions: int = 256) -> Path:
    """The folder of a model, written once in a test run; tests that change one copy it first."""
    return _folder(dialect, positions)


@functools.cache
def _folder(dialect: str, positions: int) -> Path:  # however it is asked for
    path = Path(_home().name) / f"{dialect}-{positions}"
    config = bundle(dialect, positions)
    export_model(weights(config), config, path, tokenizer=build_tokenizer())
    return path


@functools.cache
def _home() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="tiny-model-")


def write_parts(place: Path) -> tuple[Path, Path]:
    """(CLIP folder, LLaMA folder), cut out of a LLaVA-1.5 folder."""
    source, found = folder("llava-1.5"), {}
    prefix = "model.vision_tower.vision_tower."
    for name, array in _tensors(source).items():
        if name.startswith(prefix):
            found.setdefault("clip", {})[name.removeprefix(prefix)] = array
        elif "projector" not in name:
            found.setdefault("llm", {})[name] = array
    for name, arrays in found.items():
        shutil.copytree(source, place / name)
        save_file(arrays, place / name / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (place / "clip" / "config.json").write_text(json.dumps(config["vision_config"]))
    (place / "llm" / "config.json").write_text(json.dumps(language_config(config)))
    return place / "clip", place / "llm"


def language_config(config: dict[str, Any]) -> dict[str, Any]:
    """What a LLaVA's config.json says of its language model, as a LLaMA's own config.json."""
    names = {*llama_json(tiny.LLM), "eos_token_id", "pad_token_id", "torch_dtype"}
    kept = {name: value for name, value in config.items() if name in names}
    return kept | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    return {n: a for path in folder.glob("*.safetensors") for n, a in load_file(path).items()}


def picture(seed: int, height: int = 30, width: int = 40) -> np.ndarray:
    """uint8 [H, W, 3]: coarse random squares, so that images differ after resizing."""
    squares = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return np.kron(squares, np.ones((height // 3, width // 4, 1), np.uint8))


def write_picture(path: Path, seed: int) -> Path:
    Image.fromarray(picture(seed)).save(path)
    return path


def write_video(path: Path, seconds: int, rate: int = 4) -> Path:
    """A clip whose image changes every second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 40, 30, "yuv420p"
        for number in range(seconds * rate):
            frame = av.VideoFrame.from_ndarray(picture(number // rate), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
