"""Where answers end: at a token if it is the whole end, else at a text."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import llava_mini_jax
from llava_mini_jax import Model, Session, cli
from llava_mini_jax.config import LLAMA_3_1_8B
from llava_mini_jax.data.text.conversation import TEMPLATES, Turn, encode
from llava_mini_jax.inference.answer import AnswerText, Settings
from llava_mini_jax.inference.prompt_template import end_of_turn, stop_text
from llava_mini_jax.inference.ticket import Request, Ticket
from llava_mini_jax.inference.work import Work
from tests import tiny, tiny_model
from tests.data.toy_tokenizers import as_fast, make_byte_level, make_metaspace

fast_compilation = tiny.fast_compilation


def without_end():
    """Like LLaMA-3's: "</s>" is four letters to it."""
    values = json.loads(make_byte_level().backend_tokenizer.to_str())
    values["added_tokens"] = [t for t in values["added_tokens"] if t["content"] != "</s>"]
    words = values["model"]["vocab"]
    words["<unused>"] = words.pop("</s>")
    from tokenizers import Tokenizer

    core = Tokenizer.from_str(json.dumps(values))
    return as_fast(core, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


@pytest.mark.parametrize("name", ["vicuna_v1", "llava_v1", "brief"])
def test_the_last_letter_of_an_end_is_no_end(name: str) -> None:
    tokenizer, template = without_end(), TEMPLATES[name]
    assert len(tokenizer("</s>", add_special_tokens=False).input_ids) > 1
    assert end_of_turn(template, tokenizer) is None
    assert stop_text(template, tokenizer) == "</s>"
    turns = [Turn("user", "q"), Turn("assistant", "<b>bold</b>")]
    encoded = encode(template, [*turns, *turns], tokenizer, double_bos=False)
    learnt = encoded.ids[encoded.supervised].tolist()
    assert tokenizer.decode(learnt) == " <b>bold</b></s>" * 2, "labels write the whole end"
    answer = AnswerText(tokenizer, (), ["</s>"], 100, "length")
    assert "".join(answer.push([token]) for token in learnt) == "<b>bold</b>"
    assert answer.finish == "stop"


@pytest.mark.parametrize(
    ("make", "name", "end"),
    [
        (make_metaspace, "vicuna_v1", "</s>"),
        (make_metaspace, "plain", "\n"),
        (make_byte_level, "vicuna_v1", "</s>"),
        (make_byte_level, "llama_3", "<|eot_id|>"),
        (make_byte_level, "plain", "Ċ"),
        (without_end, "llama_3_1", "<|eot_id|>"),
    ],
)
def test_a_whole_end_is_a_token(make, name: str, end: str) -> None:
    tokenizer = make()
    assert tokenizer.convert_ids_to_tokens(end_of_turn(TEMPLATES[name], tokenizer)) == end
    assert stop_text(TEMPLATES[name], tokenizer) is None


@pytest.fixture(scope="module")
def model() -> Model:
    return llava_mini_jax.load(tiny_model.folder("paper"))


def test_models_stop_at_the_text(model: Model) -> None:
    other = dataclasses.replace(model, tokenizer=without_end())
    assert other.stop_text == "</s>" and model.stop_text is None
    eot = other.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert set(other.stop_ids) == {eot, *model.bundle.eos_ids}, "no '>' among them"
    settings = Settings(stop=["x"])
    assert list(other.with_stop_text(settings).stop) == ["x", "</s>"]
    assert other.with_stop_text(other.with_stop_text(settings)) == other.with_stop_text(settings)
    assert model.with_stop_text(settings) is settings
    assert list(Session(other, settings).settings.stop) == ["x", "</s>"]
    example = model.request("a", model.read_pictures(None, None))
    ticket = Ticket(Request(example, (), settings), lambda _: None)
    assert list(Work(ticket, other).text.stop) == ["x", "</s>"]


# --- The released checkpoint's own config.json ----------------------------------------------------

PUBLISHED = {
    "architectures": ["LlavaMiniLlamaForCausalLM"],
    "model_type": "llava_mini_llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "rope_scaling": dataclasses.asdict(LLAMA_3_1_8B.rope.scaling) | {"rope_type": "llama3"},
    "rope_theta": 500000.0,
    "transformers_version": "4.43.1",
    "use_cache": True,
}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A tiny folder whose config.json has the fields of the released checkpoint, and no others."""
    folder = tmp_path / "llava-mini-llama-3.1-8b"
    shutil.copytree(tiny_model.folder("release"), folder)
    values = json.loads((folder / "config.json").read_text()) | PUBLISHED
    del values["llava_mini_jax"]
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_the_published_config_can_be_asked(published: Path, capsys) -> None:
    model = llava_mini_jax.load(published)
    assert model.bundle.prompt.template == "llama_3_1"
    assert model.bundle.model.llm.rope == LLAMA_3_1_8B.rope
    picture = tiny_model.picture(0)
    answer = model.generate("which digit?", picture, max_new_tokens=4)
    path = tiny_model.write_picture(published.parent / "a.png", 0)
    words = ["ask", str(published), "which digit?", "--image", str(path), "--max-new-tokens", "4"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out.strip() == answer
    # And after convert, whose folders are of the same form.
    assert cli.main(["convert", str(published), str(published.parent / "again")]) == 0
    assert "llama_3_1 (the language model is a LLaMA-3.1" in capsys.readouterr().out
    again = llava_mini_jax.load(published.parent / "again")
    none = np.zeros((30, 40, 3), np.uint8)
    assert again.generate("a", none, max_new_tokens=4) == model.generate(
        "a", none, max_new_tokens=4
    )
