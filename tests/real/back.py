"""What tests/real/check.py exported, opened by transformers.

    PYTHONPATH=overlay python tests/real/back.py OUT      (the environment of peers.py)

An llava-hf export must give the same logits and greedy ids as the folder it came from, bit for bit,
miss nothing and have nothing left over; LLaVA-1.5's and the release's formats are read as language
models, whose text logits must be the same. Writes OUT/rows.json; ends with 1 if a row is wrong.
"""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

OTHERS = ("model.vision_tower", "model.mm_projector")
LANGUAGE_MODELS = {"qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM}


def logits_and_ids(
    model: torch.nn.Module, case: Path, *, picture: bool
) -> tuple[np.ndarray, list[int]]:
    """Logits of the prompt and the greedy ids behind it, with the image or its text alone."""
    with np.load(case / "expected.npz") as file:
        given = dict(file)
    image = int(given["image"])
    places = 16 if picture else 0
    ids = [int(j) for i in given["ids"] for j in ([i] * places if i == image else [i])]
    more = {"pixel_values": torch.from_numpy(given["pixels"])} if picture else {}
    x = torch.tensor([ids])
    inputs = dict(input_ids=x, attention_mask=torch.ones_like(x), **more)
    how = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        logits = model(**inputs).logits[0].numpy()
        return logits, model.generate(**inputs, **how)[0, len(ids) :].tolist()


def read(kind: type, folder: Path) -> tuple[torch.nn.Module, dict]:
    model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model.eval(), info


def problems_of(case: Path) -> list[str]:
    """Everything that is not equal, in words."""
    original, _ = read(LlavaForConditionalGeneration, case / "folder")
    logits, ids = logits_and_ids(original, case, picture=True)
    again, info = read(LlavaForConditionalGeneration, case / "export-llava-hf")
    found, found_ids = logits_and_ids(again, case, picture=True)
    rows = min(found.shape[-1], logits.shape[-1])  # the export's table has a row for "<image>"
    wrong = []
    if not (found[:, :rows] == logits[:, :rows]).all():
        wrong.append(f"llava-hf logits differ by {np.abs(found - logits)[:, :rows].max():.2g}")
    if found_ids != ids:
        wrong.append("llava-hf greedy ids differ")
    wrong += [f"llava-hf {k}: {info[k]}" for k in ("missing_keys", "unexpected_keys") if info[k]]
    processor = AutoProcessor.from_pretrained(case / "export-llava-hf")
    picture = Image.new("RGB", (60, 40))
    made = processor(images=picture, text="USER: <image>\nWhat? ASSISTANT:", return_tensors="pt")
    places = int((made["input_ids"] == again.config.image_token_index).sum())
    if places != 16:
        wrong.append(f"the processor makes {places} places for an image of 16 patches")
    text, text_ids = logits_and_ids(original, case, picture=False)
    language = LANGUAGE_MODELS.get(original.config.text_config.model_type, LlamaForCausalLM)
    for kind in ("llava-1.5", "release"):
        model, info = read(language, case / f"export-{kind}")
        strange = [k for k in info["unexpected_keys"] if not k.startswith(OTHERS)]
        found, found_ids = logits_and_ids(model, case, picture=False)
        if info["missing_keys"] or strange or found_ids != text_ids or (found != text).any():
            wrong.append(f"{kind} read as a language model differs")
    return wrong


def padding_problems(folder: Path) -> list[str]:
    """An export that pads images to squares: its processor's pixels against ours."""
    processor = AutoProcessor.from_pretrained(folder / "export").image_processor
    with np.load(folder / "expected.npz") as file:
        pictures = [Image.fromarray(file[name]) for name in ("lying", "upright")]
    with np.load(folder / "ours.npz") as file:
        ours = file["pixels"]
    made = processor(pictures, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    levels = 255 * (made * np.array(processor.image_std) + np.array(processor.image_mean))
    worst = np.abs(levels - ours).max()
    return [] if worst <= 2.01 else [f"pixels differ by {worst:.0f} of 255"]


def row_of(case: Path) -> dict[str, object]:
    row = json.loads((case / "checked.json").read_text())
    right, back = row["right"], "-"
    if (case / "export-llava-hf").is_dir():
        wrong = problems_of(case)
        right, back = right and not wrong, "; ".join(wrong) or "equal bits"
    if (case / "export").is_dir():
        wrong = padding_problems(case)
        right, back = right and not wrong, "; ".join(wrong) or "equal to two levels"
    came = {
        "equal": lambda: (
            f"logits to {row['error']:.0e}, greedy ids {'equal' if row['greedy'] else 'DIFFER'}"
        ),
        "pixels": lambda: f"pixels to {row['error']:.0f} of 255",
        "refused": lambda: "refused: " + row["text"].replace("|", "/").splitlines()[0][:100],
        "opened": lambda: "OPENED, must be refused",
    }
    return {"here": came[row["kind"]](), "back": back, "right": right}


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    out = Path(sys.argv[1])
    rows = {path.parent.name: row_of(path.parent) for path in sorted(out.glob("*/checked.json"))}
    (out / "rows.json").write_text(json.dumps(rows))
    wrong = {name: row for name, row in rows.items() if not row["right"]}
    versions = (out / "versions").read_text()
    print(f"{versions}: {len(rows) - len(wrong)} of {len(rows)} rows are right")
    for name, row in wrong.items():
        print(f"  {name}: {row['here']}; {row['back']}")
    sys.exit(bool(wrong))
