"""Loading tokenizers: ids are those of the folder's own files, whatever config.json says of it."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import LlamaTokenizer

from llava_mini_jax.data.text import tokenizer_trial
from llava_mini_jax.data.text.conversation import TEMPLATES, Turn, encode
from llava_mini_jax.data.text.tokenizer import load_tokenizer
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference.answer import AnswerText
from llava_mini_jax.inference.prompt_template import end_of_turn
from tests.data.mutated import damaged
from tests.data.toy_tokenizers import make_byte_level, make_metaspace, training_lines

TEXTS = [
    *(
        "Hello world",
        "  two  spaces ",
        "a <s> b</s> c",
        "é 你好 🎂",
        "1234567\n\n\ttab",
        "",
        "ﬁ Ａ",
    ),
    *training_lines()[:2],
]
ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer like Vicuna's, as its own files alone."""
    make_metaspace().save_pretrained(tmp_path)
    change(tmp_path / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    return tmp_path


def change(path: Path, **fields: Any) -> None:
    """Sets fields of a json file; `...` removes one."""
    values = (json.loads(path.read_text()) if path.exists() else {}) | fields
    path.write_text(json.dumps({name: v for name, v in values.items() if v is not ...}))


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- Ids ------------------------------------------------------------------------------------------


def old_llama(core: Tokenizer) -> None:
    """LLaMA-2's published tokenizer.json: a space in front of every stretch of text."""
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.pre_tokenizer = None  # type: ignore[assignment]


def like_yi(core: Tokenizer) -> None:
    """No space in front, none taken away."""
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = None  # type: ignore[assignment]
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )


def composed(core: Tokenizer) -> None:
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])


def single_digits(core: Tokenizer) -> None:
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )


def cut_and_filled(core: Tokenizer) -> None:
    """What a training script left in the file: no part of what a text is."""
    core.enable_truncation(4)
    core.enable_padding(length=50)


def with_end(core: Tokenizer) -> None:
    from tokenizers import processors

    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )


FORMS = (old_llama, like_yi, composed, single_digits, cut_and_filled)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "class_name", ["LlamaTokenizer", "LlamaTokenizerFast", "TokenizersBackend"]
)
def test_ids_are_those_of_tokenizer_json(folder: Path, form: Any, class_name: str) -> None:
    change(folder / "tokenizer_config.json", tokenizer_class=class_name)
    change(folder / "config.json", model_type="llama")
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    form(core)
    core.save(str(folder / "tokenizer.json"))
    core.no_padding()
    core.no_truncation()
    found = load_tokenizer(folder)
    for text in TEXTS:
        ids = core.encode(text).ids
        assert found(text).input_ids == found.backend_tokenizer.encode(text).ids == ids
        assert found.decode(ids, skip_special_tokens=True) == core.decode(ids)
    turns = [Turn("user", "What is  this?"), Turn("assistant", None)]
    prompt = encode(TEMPLATES["vicuna_v1"], turns, found, double_bos=False)
    text = "".join((TEMPLATES["vicuna_v1"].system, "USER: What is  this? ASSISTANT:"))
    assert prompt.ids.tolist() == core.encode(text).ids


def test_a_prompt_begins_as_the_file_says_and_has_no_end(folder: Path) -> None:
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with_end(core)
    core.save(str(folder / "tokenizer.json"))
    # The file is asked, also where no other names a first token.
    change(folder / "tokenizer_config.json", bos_token=..., tokenizer_class=...)
    turns = [Turn("user", "a"), Turn("assistant", None)]
    ids = encode(TEMPLATES["vicuna_v1"], turns, load_tokenizer(folder), double_bos=False).ids
    assert ids[0] == 1 and 1 not in ids[1:] and 2 not in ids


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llava_mini_llama", "rope_scaling": ROPE, "rope_theta": 500000.0},
        {"model_type": "llava_llama", "rope_scaling": ROPE},
        {"model_type": "llava_mini_llama", "rope_parameters": {**ROPE, "rope_theta": 5e5}},
        {"model_type": "no_such", "rope_scaling": ROPE, "rope_parameters": {"rope_theta": 1.0}},
        {"model_type": "llama", "rope_scaling": [1, 2]},
        {"model_type": "llama", "rope_scaling": "llama3", "tokenizer_class": "BertTokenizer"},
        {"model_type": "mistral", "transformers_version": "nonsense"},
        {"model_type": ["llama"], "auto_map": {"AutoTokenizer": ["a--b.C", None]}},
        None,
    ],
)
@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
def test_config_json_is_not_asked(
    folder: Path, config: Any, kind: str, sentencepiece_model: Path
) -> None:
    if kind == "tokenizer.model":
        (folder / "tokenizer.json").unlink()
        shutil.copy(sentencepiece_model, folder / kind)
    expected = [load_tokenizer(folder)(text).input_ids for text in TEXTS]
    (folder / "config.json").write_text("{" if config is None else json.dumps(config))
    found = load_tokenizer(folder)
    assert [found(text).input_ids for text in TEXTS] == expected
    assert (found.bos_token, found.eos_token, found.eos_token_id) == ("<s>", "</s>", 2)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sentencepiece")
    (place / "text").write_text("\n".join(training_lines() * 5))
    options = {"vocab_size": 500, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    ends = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        input=str(place / "text"), model_prefix=str(place / "tokenizer"), **options, **ends
    )
    return place / "tokenizer.model"


@pytest.mark.parametrize("alone", [True, False])
def test_a_sentencepiece_model_alone(
    tmp_path: Path, sentencepiece_model: Path, alone: bool
) -> None:
    shutil.copy(sentencepiece_model, tmp_path)
    if not alone:
        change(tmp_path / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", legacy=False)
    found = load_tokenizer(tmp_path)
    own = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    for text in ("Hello world", "USER: What is it? ASSISTANT:", "é 你好"):
        assert found(text).input_ids == [1, *own.encode(text)]
    assert isinstance(found, LlamaTokenizer) and found.eos_token_id == 2


@pytest.mark.parametrize("name", [None, "LlamaTokenizer", "GPT2Tokenizer", "NoSuchTokenizer"])
def test_a_folder_without_a_vocabulary(tmp_path: Path, name: str | None) -> None:
    """Some of transformers' classes would make one of three words, without a word."""
    change(tmp_path / "tokenizer_config.json", tokenizer_class=name, eos_token="</s>")
    change(tmp_path / "config.json", model_type="llama")
    assert "has no tokenizer that can be loaded (there are no files of one)" in refusal(tmp_path)


# --- The other files ------------------------------------------------------------------------------


def test_special_tokens_from_either_file(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    change(path, bos_token={"__type": "AddedToken", "content": "<s>"}, eos_token="<|eot_id|>")
    assert load_tokenizer(folder).eos_token == "<|eot_id|>"
    older = {"eos_token": {"content": "</s>", "lstrip": False}, "pad_token": "<unk>"}
    change(folder / "special_tokens_map.json", **older)
    change(path, added_tokens_decoder=...)
    found = load_tokenizer(folder)
    assert (found.eos_token, found.pad_token, found.bos_token) == ("</s>", "<unk>", "<s>")
    change(path, added_tokens_decoder={"1": {"content": "<s>", "special": True}})
    assert load_tokenizer(folder).eos_token == "<|eot_id|>"


def test_a_special_token_that_is_no_token(folder: Path) -> None:
    """transformers would add it, with an id that the model has no row for."""
    size = len(load_tokenizer(folder))
    change(folder / "tokenizer_config.json", eos_token="<|im_end|>", pad_token="[PAD]")
    found = load_tokenizer(folder)
    assert len(found) == size and found.eos_token_id is None and found.pad_token_id is None
    assert found("<|im_end|>").input_ids == found.backend_tokenizer.encode("<|im_end|>").ids


def test_tokens_that_only_the_other_files_know(folder: Path) -> None:
    size = len(load_tokenizer(folder))
    change(folder / "added_tokens.json", **{"<new>": size})
    found = load_tokenizer(folder)
    assert found.convert_tokens_to_ids("<new>") == size
    assert found("a<new>b", add_special_tokens=False).input_ids.count(size) == 1
    change(folder / "added_tokens.json", **{"<new>": size + 5})
    assert f'"<new>" has the id {size + 5}' in refusal(folder)
    (folder / "added_tokens.json").unlink()
    declared = {"7": {"content": "</s>", "special": True}}
    change(folder / "tokenizer_config.json", added_tokens_decoder=declared)
    assert '"</s>" has the id 7' in refusal(folder) and "2 by tokenizer.json" in refusal(folder)


DEFAULT = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


def test_chat_templates_of_every_file(folder: Path) -> None:
    def text() -> str | None:
        return load_tokenizer(folder).chat_template

    assert text() is None
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "default.jinja").write_text("1")
    assert text() == "1"
    change(folder / "chat_template.json", chat_template="2")
    assert text() == "2"
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": "3"}]
    change(folder / "tokenizer_config.json", chat_template=named)
    assert text() == "3"
    change(folder / "tokenizer_config.json", chat_template={"default": "4", "rag": "y"})
    assert text() == "4"
    (folder / "chat_template.jinja").write_text("5")
    assert text() == "5"
    (folder / "chat_template.jinja").write_text("")
    assert text() is None
    (folder / "chat_template.jinja").unlink()
    change(folder / "tokenizer_config.json", chat_template={"tools": "4", "rag": "y"})
    several = load_tokenizer(folder)
    turns = [Turn("user", "a"), Turn("assistant", None)]
    with pytest.raises(InputError, match="named tools, rag, and none is called"):
        encode(TEMPLATES["chat"], turns, several, double_bos=False)
    assert len(encode(TEMPLATES["vicuna_v1"], turns, several, double_bos=False).ids)


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("tokenizer_config.json", {"eos_token": 2}),
    ("tokenizer_config.json", {"eos_token": {"content": None}}),
    ("tokenizer_config.json", {"bos_token": ["<s>"]}),
    ("tokenizer_config.json", {"unk_token": "\ud800"}),
    ("tokenizer_config.json", {"chat_template": 7}),
    ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}),
    ("tokenizer_config.json", {"chat_template": {"default": ["x"]}}),
    ("tokenizer_config.json", {"tokenizer_class": ["LlamaTokenizer"]}),
    ("tokenizer_config.json", {"added_tokens_decoder": ["<s>"]}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"one": {"content": "<s>"}}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"1": "<s>"}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"1": {"content": "<s>", "lstrip": 3}}}),
    ("tokenizer_config.json", {"model_max_length": "4096"}),
    ("tokenizer_config.json", {"padding_side": "middle"}),
    ("tokenizer_config.json", {"add_bos_token": "yes"}),
    ("special_tokens_map.json", {"eos_token": 2}),
    ("added_tokens.json", {"<new>": "600"}),
    ("added_tokens.json", {"<new>": True}),
    ("added_tokens.json", {"<new>": -1}),
]


@pytest.mark.parametrize(("name", "fields"), WRONG)
def test_wrong_types_are_named(folder: Path, name: str, fields: dict[str, Any]) -> None:
    change(folder / "tokenizer_config.json", added_tokens_decoder=...)
    change(folder / name, **fields)
    said = refusal(folder)
    assert str(folder / name) in said and next(iter(fields)) in said


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("text", ["[1]", "{", '"a"', "[" * 100_000, "\xff"])
def test_files_that_are_no_objects(folder: Path, name: str, text: str) -> None:
    change(folder / "tokenizer_config.json", added_tokens_decoder=...)
    (folder / name).write_bytes(text.encode("latin-1"))
    assert str(folder / name) in refusal(folder)


# --- Damaged and hostile tokenizer.json -----------------------------------------------------------


def replaced(folder: Path, **parts: Any) -> None:
    change(folder / "tokenizer.json", **parts)


def test_a_file_that_would_end_the_process(folder: Path) -> None:
    many = {"type": "Replace", "pattern": {"Regex": "."}, "content": "aaaaaaaaaa"}
    replaced(folder, normalizer={"type": "Sequence", "normalizers": [many] * 9})
    assert "is not a tokenizer that can be used" in refusal(folder)
    replaced(folder, normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="})
    assert "is not a tokenizer that can be used" in refusal(folder)


def test_ids_that_are_none(folder: Path) -> None:
    core = json.loads((folder / "tokenizer.json").read_text())
    core["post_processor"]["special_tokens"]["<s>"]["ids"] = [2**32 - 1]
    replaced(folder, **core)
    assert "id 4294967295" in refusal(folder)


def test_a_tokenizer_that_reads_at_random(folder: Path) -> None:
    core = json.loads((folder / "tokenizer.json").read_text())
    replaced(folder, model=core["model"] | {"dropout": 0.3})
    assert "dropout of 0.3" in refusal(folder)


@pytest.mark.parametrize("make", [make_byte_level, make_metaspace])
def test_damaged_files_are_refused_or_work(tmp_path: Path, make: Any) -> None:
    make().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    whole, kinds = path.read_text(), set()
    for seed in range(40):
        path.write_bytes(damaged(whole, seed))
        try:
            tokenizer = load_tokenizer(tmp_path)
            for name in ("vicuna_v1", "llama_3"):
                turns = [Turn("user", "<image>\nWhät? 🎂"), Turn("assistant", "<b>a</b>\n</s> é")]
                encoded = encode(TEMPLATES[name], turns, tokenizer, double_bos=False)
                answer = AnswerText(tokenizer, [], [], 10_000, "length")
                answer.push(int(i) for i in encoded.ids if i >= 0)
                end_of_turn(TEMPLATES[name], tokenizer)
            kinds.add("works")
        except InputError as error:  # anything else fails the test
            assert "\n" not in str(error) and len(str(error)) < 1000
            kinds.add("refused")
    assert kinds == {"works", "refused"}


def test_a_file_is_tried_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_tokenizer(folder)
    monkeypatch.setattr(tokenizer_trial, "Guarded", None)  # none is started
    assert load_tokenizer(folder).eos_token_id == 2


def test_nothing_is_left_running(folder: Path) -> None:
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    if not children.exists():
        pytest.skip("only Linux says which processes were started")
    before = children.read_text()
    replaced(folder, version="1.0", padding=None)
    load_tokenizer(folder)
    assert children.read_text() == before
