"""Parameters back into published folders: the inverse of import_hf, bit for bit.

    parameters --names.py--> (name, array), one tensor at a time --> safetensors shards + index
    Bundle --export_json.py--> config.json and its siblings

The release's layout holds every model of this code base; LLaVA-1.5's layouts hold those without
compressor and pre-fusion.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llava_mini_jax import distributed
from llava_mini_jax import params as param_tree
from llava_mini_jax.config import Bundle
from llava_mini_jax.data.text import question_ids
from llava_mini_jax.data.text.conversation import IMAGE_MARK
from llava_mini_jax.data.text.tokenizer import load_tokenizer
from llava_mini_jax.data.text.tokenizer_files import TOKENIZER_FILES
from llava_mini_jax.errors import InputError
from llava_mini_jax.models import llava_mini
from llava_mini_jax.models.llava_mini import LlavaMini, LlavaMiniConfig
from llava_mini_jax.params import ParamSpec
from llava_mini_jax.tensorfiles.save import save_tensors
from llava_mini_jax.weights import names
from llava_mini_jax.weights.export_json import config_files, with_image_token

FORMATS = ("release", "llava-1.5", "llava-hf")


def published_tensors(
    params: LlavaMini, cfg: LlavaMiniConfig, layout: names.Layout
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every parameter, or of every gradient, in a layout's names and shapes.

    Leaves that are None are left out. Raises InputError for a parameter that the layout lacks.
    """
    spec = llava_mini.spec(cfg)
    if params.llm is not None and isinstance(params.llm.layers, tuple):
        spec = llava_mini.unrolled(spec)
    table = names.table(layout, cfg)
    specs = param_tree.paths(spec)
    packed: dict[str, list[np.ndarray | None]] = {}
    for path, leaf in param_tree.paths(params).items():
        sources = names.sources(path, specs[path], table, cfg.vision.used_layers)
        if sources is None:
            raise InputError(f"this format has no tensor for {path}: export it as --format release")
        shape = _published_shape(specs[path])
        for i, source in enumerate(sources):
            array = distributed.fetch(leaf[i] if specs[path].stacked else leaf).reshape(shape)
            if source.parts == 1:
                yield source.name, array
                continue
            # torch has q, k and v in one tensor, which is written once all three are there.
            pieces = packed.setdefault(source.name, [None] * source.parts)
            pieces[source.part] = array
            if all(piece is not None for piece in pieces):
                yield source.name, np.concatenate(packed.pop(source.name))  # pyright: ignore
    assert not packed, f"incomplete packed tensors {sorted(packed)}"


def _published_shape(spec: ParamSpec) -> tuple[int, ...]:
    """Our shape with every pair of axes (heads, head width) as one, and without the layer axis."""
    shape: list[int] = []
    axes: list[str | None] = []
    for size, axis in zip(spec.shape, spec.axes, strict=True):
        if axis == "layers":
            continue
        if axes and axes[-1] == "heads" and axis is None:
            shape[-1] *= size
        else:
            shape.append(size)
        axes.append(axis)
    return tuple(shape)


def export_model(
    params: LlavaMini,
    bundle: Bundle,
    folder: Path,
    *,
    format: str = "release",
    tokenizer: Any = None,
    copy_from: Path | None = None,
) -> None:
    """Writes a complete model folder; nothing is left behind if it fails half-way.

    `copy_from`: a model folder whose tokenizer files are taken over unchanged.
    """
    if format not in FORMATS:
        raise InputError(f'format "{format}" is unknown; use one of {", ".join(FORMATS)}')
    if format != "release" and (
        bundle.model.compressor.kind != "none" or bundle.model.prefusion_layers
    ):
        raise InputError(
            f'format "{format}" has no place for compressor and pre-fusion: use --format release'
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty: choose another output folder")
    layout = names.LAYOUTS["llava-hf" if format == "llava-hf" else "release"]
    with written_beside(folder) as work:
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
            if reader := question_ids.reader_of(tokenizer):
                reader.tokenizer.save_pretrained(work / question_ids.FOLDER)
        elif copy_from is not None:
            _copy_tokenizer(copy_from, work)
            if bundle.model.declared.question:
                _copy_tokenizer(question_ids.find(copy_from), work / question_ids.FOLDER)
        tensors = published_tensors(params, bundle.model, layout)
        files = config_files(bundle, format)
        if format == "llava-hf" and any(work.glob("tokenizer*")):
            token = _add_image_token(work)
            files |= with_image_token(files, bundle, token)
            tensors = _with_rows(tensors, token + 1)
        for name, content in files.items():
            (work / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_tensors(work, tensors)


def _copy_tokenizer(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        if path.name.startswith(TOKENIZER_FILES) and path.is_file():
            shutil.copy2(path, target)
        elif path.name == "additional_chat_templates" and path.is_dir():
            shutil.copytree(path, target / path.name)


def gather_model(params: LlavaMini, bundle: Bundle) -> None:
    """The part of the other processes while the first one writes a release folder."""
    for _ in published_tensors(params, bundle.model, names.LAYOUTS["release"]):
        pass


@contextlib.contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name at the end, or disappears."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield work
        work.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _add_image_token(folder: Path) -> int:
    """The id of "<image>" in the folder's tokenizer, which has it from now on.

    transformers finds images by it; our prompts are cut at the word before they are tokenised.
    """
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([IMAGE_MARK], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return tokenizer.convert_tokens_to_ids(IMAGE_MARK)


def _with_rows(
    tensors: Iterator[tuple[str, np.ndarray]], tokens: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Tables of at least so many tokens: a row that is added is the mean, which is never said."""
    for name, array in tensors:
        missing = tokens - len(array) if name.endswith(names.TABLES) else 0
        if missing > 0:
            mean = array.mean(axis=0, keepdims=True, dtype=np.float32).astype(array.dtype)
            array = np.concatenate([array, np.repeat(mean, missing, axis=0)])
        yield name, array
