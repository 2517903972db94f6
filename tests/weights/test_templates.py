"""Which template a folder's prompts get, what people are told of it, and its tokens that end."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import llava_mini_jax
from llava_mini_jax import cli
from llava_mini_jax.errors import InputError
from llava_mini_jax.weights import folders
from tests import tiny, tiny_model

fast_compilation = tiny.fast_compilation
CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
LLAMA_3_CHAT = "{% for m in messages %}<|start_header_id|>{{ m.content }}<|eot_id|>{% endfor %}"
ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
VICUNA, LLAMA_3 = {"rope_theta": 10000.0}, {"rope_theta": 500000.0}
LLAMA_3_1 = {"rope_theta": 500000.0, "rope_scaling": ROPE}
OTHER = {"rope_theta": 100000.0}


def change(path: Path, **fields: Any) -> None:
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: v for name, v in values.items() if v is not ...}))


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, Path]:
    return tiny_model.write_parts(tmp_path)


CASES = [
    # rope, chat template, of a language model alone, of a LLaVA
    (VICUNA, None, "vicuna_v1", "vicuna_v1"),
    (VICUNA, CHAT, "chat", "vicuna_v1"),
    (LLAMA_3, None, "llama_3", "llama_3"),
    (LLAMA_3, LLAMA_3_CHAT, "llama_3", "llama_3"),
    (LLAMA_3, CHAT, "chat", "chat"),
    (LLAMA_3_1, None, "llama_3_1", "llama_3_1"),
    (LLAMA_3_1, LLAMA_3_CHAT, "llama_3_1", "llama_3_1"),
    (LLAMA_3_1, CHAT, "chat", "chat"),
    (OTHER, CHAT, "chat", "chat"),
    (OTHER, None, "vicuna_v1", "vicuna_v1"),
]


@pytest.mark.parametrize(("rope", "chat", "alone", "llava"), CASES)
def test_the_template_of_a_model(
    parts: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rope: dict[str, Any],
    chat: str | None,
    alone: str,
    llava: str,
) -> None:
    clip, llm = parts
    folder = shutil.copytree(tiny_model.folder("llava-1.5"), tmp_path / "llava")
    for path in (llm, folder):
        change(path / "config.json", llava_mini_jax=..., **rope)
        if chat is not None:
            (path / "chat_template.jinja").write_text(chat)
    words = ["--clip", str(clip), "--llm", str(llm), "--prefusion-layers", "1"]
    assert cli.main(["convert", *words, str(tmp_path / "start")]) == 0
    assert f"template of prompts: {alone} (" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path / "start")]) == 0
    said = capsys.readouterr().out
    assert f"template of prompts: {alone} (its config.json says so)" in said
    assert llava_mini_jax.load(tmp_path / "start").bundle.prompt.template == alone
    assert cli.main(["inspect", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"template of prompts: {llava} (" in said and "config.json" not in said
    bundle, _ = folders.open_model(folder, compute_dtype="float32")
    assert bundle.prompt.template == llava


def test_a_model_speaks_as_its_chat_template_does(parts: tuple[Path, Path], tmp_path: Path) -> None:
    clip, llm = parts
    change(llm / "config.json", llava_mini_jax=..., **OTHER)
    (llm / "chat_template.jinja").write_text(CHAT)
    (llm / "additional_chat_templates").mkdir()
    (llm / "additional_chat_templates" / "rag.jinja").write_text("x")
    words = ["--clip", str(clip), "--llm", str(llm), "--prefusion-layers", "1"]
    assert cli.main(["convert", *words, str(tmp_path / "start")]) == 0
    assert (tmp_path / "start" / "additional_chat_templates" / "rag.jinja").read_text() == "x"
    model = llava_mini_jax.load(tmp_path / "start")
    system = "[system] You are a helpful language and vision assistant."
    ids = model.request("one two", model.read_pictures(None, None)).ids
    expected = model.tokenizer(f"{system}</s>[user] one two</s>").input_ids
    assert ids[:4].tolist() == expected[:4] and ids[-4:].tolist() == expected[-4:]
    assert model.generate("one", tiny_model.picture(0), max_new_tokens=3)
    (tmp_path / "start" / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(InputError, match="chat template fails: no; use another template"):
        llava_mini_jax.load(tmp_path / "start")
    assert llava_mini_jax.load(tmp_path / "start", template="brief")
    (tmp_path / "start" / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match='named rag, and none is called "default"'):
        llava_mini_jax.load(tmp_path / "start")
    shutil.rmtree(tmp_path / "start" / "additional_chat_templates")
    with pytest.raises(InputError, match="the tokenizer has none"):
        llava_mini_jax.load(tmp_path / "start")


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
@pytest.mark.parametrize(
    "given", ["2", 2.0, True, -1, [2, "3"], [2, [3]], {"a": 2}, [None], 2**31, [2, False]]
)
def test_ends_that_are_no_ids(tmp_path: Path, where: str, given: Any) -> None:
    folder = shutil.copytree(tiny_model.folder("paper"), tmp_path / "model")
    (folder / "generation_config.json").write_text("{}")
    change(folder / where, eos_token_id=given)
    with pytest.raises(InputError, match=f"{where}.*eos_token_id.*expected") as caught:
        folders.open_model(folder, compute_dtype="float32")
    assert "\n" not in str(caught.value)


def test_ends_of_either_file(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model.folder("paper"), tmp_path / "model")
    change(folder / "generation_config.json", eos_token_id=[5, 7, 5])
    assert folders.open_model(folder, compute_dtype="float32")[0].eos_ids == (5, 7)
    change(folder / "generation_config.json", eos_token_id=None)
    change(folder / "config.json", eos_token_id=0)
    assert folders.open_model(folder, compute_dtype="float32")[0].eos_ids == (0,)
    change(folder / "config.json", eos_token_id=[])
    assert folders.open_model(folder, compute_dtype="float32")[0].eos_ids == ()
