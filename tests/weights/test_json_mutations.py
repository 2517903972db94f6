"""Every field of every json file of a model folder, replaced by what does not belong there.

A folder opens or is refused in a sentence that names the file; nothing else may come out.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from llava_mini_jax.errors import InputError
from llava_mini_jax.weights.export_json import config_files
from llava_mini_jax.weights.folders import open_model, open_parts
from tests import tiny
from tests.golden_backbones import FOLDER as BACKBONES
from tests.weights.test_import_export import bundle

GOLDEN = Path(__file__).parents[1] / "golden" / "model"
JUNK: list[Any] = [
    *(None, True, False, 0, -1, 3, 10**30, 1.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "abc", "1", "\u0000", [], [2], [None], [1, 2, 3], {}, {"a": 1}, {"": {}}, [[[]]]),
]


@pytest.fixture
def release(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN / "hd_c2", tmp_path / "case")
    return tmp_path / "case"


@pytest.fixture
def llava_hf(tmp_path: Path) -> Path:
    """Our own llava-hf export's json files beside a file of weights that nobody reads here."""
    for name, content in config_files(bundle(tiny.model("llava-1.5")), "llava-hf").items():
        (tmp_path / name).write_text(json.dumps(content))
    save_file({"x": np.ones(1)}, tmp_path / "model.safetensors")
    return tmp_path


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Where something can be replaced: every field of every object, at any depth."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield (*path, name)
            yield from places(inner, (*path, name))


def mutants(values: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    text = json.dumps(values)
    for place in places(values):
        for junk in JUNK:
            copy = json.loads(text)
            inner = copy
            for name in place[:-1]:
                inner = inner[name]
            inner[place[-1]] = junk
            yield f"{'.'.join(place)} = {junk!r}", copy


def open_whole(folder: Path) -> None:
    open_model(folder, compute_dtype="float32")


def check(file: Path, folder: Path, opened: Callable[[Path], object] = open_whole) -> int:
    """Opens the folder with each mutant of `file`; how many were refused."""
    values, refused = json.loads(file.read_text()), 0
    opened(folder)
    for what, mutant in mutants(values):
        file.write_text(json.dumps(mutant))
        try:
            opened(folder)
        except InputError as error:
            refused += 1
            assert len(str(error)) < 1000, what
        except Exception as error:
            raise AssertionError(f"{file.name}: {what}: {type(error).__name__}: {error}") from error
    return refused


@pytest.mark.parametrize(
    "name", ["model/config.json", "clip/config.json", "clip/preprocessor_config.json"]
)
def test_release_folders(release: Path, name: str) -> None:
    assert check(release / name, release / "model") > 100


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_llava_hf_folders(llava_hf: Path, name: str) -> None:
    assert check(llava_hf / name, llava_hf) > 100


@pytest.mark.parametrize("name", ["mistral", "qwen2_window", "qwen3", "smollm3_yarn"])
def test_language_models_of_each_family(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(BACKBONES / name, tmp_path / name)
    clip = BACKBONES / "clip"
    assert check(folder / "config.json", folder, lambda llm: open_parts(clip, llm)) > 100


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_siglips_folders(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(BACKBONES / "siglip2", tmp_path / "siglip2")
    llm = BACKBONES / "llama_2"
    assert check(folder / name, folder, lambda tower: open_parts(tower, llm)) > 100


def test_a_llava_of_siglip_and_qwen2(tmp_path: Path) -> None:
    folder = shutil.copytree(BACKBONES / "llava_siglip_qwen2", tmp_path / "llava")
    assert check(folder / "config.json", folder) > 100


def test_our_own_exports(tmp_path: Path) -> None:
    for name, content in config_files(bundle(tiny.model("release")), "release").items():
        (tmp_path / name).write_text(json.dumps(content))
    save_file({"model.vision_tower.vision_tower.x": np.ones(1)}, tmp_path / "model.safetensors")
    assert check(tmp_path / "config.json", tmp_path) > 100
