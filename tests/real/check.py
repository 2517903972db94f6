"""The folders of tests/real/peers.py, opened here: logits, greedy tokens, refusals, exports.

    python tests/real/check.py OUT      (this project's environment)

Writes OUT/NAME/checked.json; models that open are exported to OUT/NAME/export-FORMAT.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_mini_jax.cli import COMMANDS, command_parser
from llava_mini_jax.data.batches.examples import (
    BatchLayout,
    Buckets,
    Example,
    collate,
    make_example,
)
from llava_mini_jax.data.media.image_file import load_image
from llava_mini_jax.data.media.images import preprocess
from llava_mini_jax.data.text.conversation import EncodedPrompt
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.model import Model, load
from llava_mini_jax.weights.export_hf import export_model
from llava_mini_jax.weights.folders import open_model
from llava_mini_jax.weights.hf_processor import image_settings, read_processor
from llava_mini_jax.weights.import_hf import load_params
from llava_mini_jax.weights.lazy_params import open_for_export
from tests import tiny
from tests.inference.steps import said

FORMATS = ("llava-hf", "llava-1.5", "release")


def check(case: Path, towers: Path) -> dict[str, Any]:
    """One row of the table: what came out, and whether that is right."""
    wanted = case / "refused"
    source = case / "folder"
    try:
        if not case.name.startswith("llava"):
            source = case / "start"
            convert("--vision", towers, "--llm", case / "folder", source, "--prefusion-layers", "1")
        model = load(source, dtype="float32")
    except InputError as error:
        text = str(error).replace(f"{case}/", "")
        right = wanted.is_file() and wanted.read_text() in text and "\n" not in text
        return {"kind": "refused", "text": text, "right": right}
    if wanted.is_file():
        return {"kind": "opened", "text": "must be refused", "right": False}
    with np.load(case / "expected.npz") as file:
        expected = dict(file)
    example = request(model, expected)
    error = float(np.abs(logits(source, model, example) - expected["logits"]).max())
    greedy = answer(model, example, len(expected["greedy"])) == expected["greedy"].tolist()
    if case.name.startswith("llava"):
        for kind in FORMATS:
            convert(source, case / f"export-{kind}", "--format", kind)
    return {"kind": "equal", "error": error, "greedy": greedy, "right": error <= 1e-4 and greedy}


def convert(*words: object) -> None:
    """`llava-mini convert`, whose refusals are InputErrors again."""
    COMMANDS["convert"].run(command_parser("convert").parse_args([str(word) for word in words]))


def request(model: Model, expected: dict[str, np.ndarray]) -> Example:
    ids = np.where(expected["ids"] == expected["image"], tiny.MARK, expected["ids"])
    none = np.zeros(len(ids), bool)
    seen = int((ids == tiny.MARK).sum())
    pixels = expected["pixels"].transpose(0, 2, 3, 1)[:seen, None]
    prompt = EncodedPrompt(ids.astype(np.int32), none, none)
    return make_example(prompt, pixels, (1,) * seen, model.bundle.prompt, training=False)


def logits(source: Path, model: Model, example: Example) -> np.ndarray:
    """Of the token to come, by the whole model at once as training computes it."""
    bundle, published = open_model(source, compute_dtype="float32")
    params = load_params(bundle, published, dtype="float32", unrolled=False)
    cfg = bundle.model
    layout = BatchLayout.of(
        cfg,
        1,
        buckets=Buckets(lengths=(64,), images=(1,)),
        padding_side="right",
        max_length=cfg.llm.max_positions,
    )
    batch = collate([example], layout, truncate=False)
    end = len(example.ids) + len(example.frames) * (cfg.tokens_per_image(1) - 1)
    return np.asarray(tiny.logits(params, batch.inputs, cfg), np.float32)[0, end - 1]


def answer(model: Model, example: Example, tokens: int) -> list[int]:
    """Greedy token ids by the engine, which no token ends."""
    bundle = dataclasses.replace(model.bundle, eos_ids=())
    endless = dataclasses.replace(model, bundle=bundle)
    endless.__dict__["stop_ids"] = (bundle.model.llm.vocab_size,)
    (ids,) = said(endless, [example], Settings(max_new_tokens=tokens)).ids
    return ids


def check_padding(folder: Path, source: Path) -> dict[str, Any]:
    """LLaVA's own image processor with do_pad against ours, in grey levels of 255.

    torchvision's bicubic filter differs from Pillow's by a level or two, so two are allowed. The
    model of `source` is exported with padding, for the way back.
    """
    processor = read_processor(folder)
    config = image_settings(processor, 28, pad=processor.pad, grid=1)
    with np.load(folder / "expected.npz") as file:
        expected = dict(file)
    worst, ours = 0.0, []
    for name, pixels in zip(("lying", "upright"), expected["pixels"], strict=True):
        (made,) = preprocess(load_image(Image.fromarray(expected[name])), config)
        theirs = pixels.transpose(1, 2, 0) * np.array(config.std) + np.array(config.mean)
        worst = max(worst, float(np.abs(made - 255 * theirs).max()))
        ours.append(made)
    np.savez(folder / "ours.npz", pixels=np.stack(ours))
    bundle, params = open_for_export(source, vision_tower=None, dtype=None)
    bundle = dataclasses.replace(bundle, images=config)
    export_model(params, bundle, folder / "export", format="llava-hf", copy_from=source)
    return {"kind": "pixels", "error": worst, "right": processor.pad and worst <= 2.01}


def main(out: Path) -> int:
    wrong = 0
    cases = sorted(path.parent for path in out.glob("*/folder"))
    for number, case in enumerate(cases):
        towers = out / ("clip_vision", "clip_full")[number % 2]
        row = check(case, towers)
        (case / "checked.json").write_text(json.dumps(row))
        print(f"{case.name}: {row}", flush=True)
        wrong += not row["right"]
    row = check_padding(out / "padding", out / "llava" / "folder")
    (out / "padding" / "checked.json").write_text(json.dumps(row))
    print(f"padding: {row}")
    return wrong + (not row["right"])


if __name__ == "__main__":
    sys.exit(min(1, main(Path(sys.argv[1]))))
