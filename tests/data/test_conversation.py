"""Conversations: the release's prompts and labels exactly, and labels that are the answers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_mini_jax.data.text.conversation import (
    IGNORE,
    IMAGE_TOKEN,
    TEMPLATES,
    Turn,
    check_images,
    check_supervised,
    encode,
    from_llava,
    place_image_mark,
)
from llava_mini_jax.data.text.prompt_text import render
from llava_mini_jax.data.text.tokenizer import load_tokenizer
from llava_mini_jax.errors import InputError
from tests.data.toy_tokenizers import (
    GOLDEN,
    LABELS,
    PROMPTS,
    make_byte_level,
    make_metaspace,
    make_toy,
)

ROOT = Path(__file__).resolve().parents[2]
CONVERSATIONS = {
    name: [Turn("user" if who == "human" else "assistant", text) for who, text in turns]
    for name, turns in PROMPTS["conversations"].items()
}
GOLDEN_NAMES = {
    "v1": "vicuna_v1",
    "llama_3": "llava_llama_3",
    "llama_3_1": "llava_llama_3_1",
}
# The original chat template of Llama-3-Instruct, and its later form without the trailing header.
LLAMA_3_CHAT = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] +"
    " '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}"
)
LLAMA_3_HEADER = "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"


@pytest.fixture(scope="module")
def toy():
    return make_toy()


@pytest.fixture(scope="module")
def tokenizers():
    return {"metaspace": make_metaspace(), "byte level": make_byte_level()}


# --- The release's strings, ids and labels --------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name for name in TEMPLATES if name not in ("brief", "chat", "chat_brief", "voco_v1")]
)
def test_prompts_equal_the_release(name):
    golden = PROMPTS["prompts"][GOLDEN_NAMES.get(name, name)]
    assert golden
    for conversation, expected in golden.items():
        assert render(TEMPLATES[name], CONVERSATIONS[conversation]) == expected


def test_vocos_prompt_is_its_authors():
    """Their evaluation's f-string, letter by letter; its VoCo tokens are the compressor's."""
    question, answer = "<image>\nA. a cat\nB. a dog", "the\ncat"
    system = TEMPLATES["vicuna_v1"].system.replace("assistant. The", "assistant of the image. The")
    whole = f"{system}USER: {question} ASSISTANT: {answer}</s>USER: why? ASSISTANT:"
    expected = "<image>\n" + whole.replace("\n", "").replace("<image>", "")
    turns = [Turn("user", question), Turn("assistant", answer), Turn("user", "why?")]
    assert render(TEMPLATES["voco_v1"], [*turns, Turn("assistant", None)]) == expected
    alone = [Turn("user", "why?\nso"), Turn("assistant", None)]
    assert render(TEMPLATES["voco_v1"], alone) == f"{system}USER: why?\nso ASSISTANT:"


def test_brief_is_vicuna_without_its_system_sentence():
    system = TEMPLATES["vicuna_v1"].system
    for turns in CONVERSATIONS.values():
        long, brief = (render(TEMPLATES[name], turns) for name in ("vicuna_v1", "brief"))
        assert long == system + brief


@pytest.mark.parametrize("row", LABELS["rows"], ids=lambda row: row["name"])
def test_labels_equal_the_release(row, toy):
    turns = CONVERSATIONS[row["name"]]
    encoded = encode(TEMPLATES[row["template"]], turns, toy, double_bos=False)
    assert encoded.ids.dtype == np.int32 and encoded.ids.tolist() == row["input_ids"]
    assert encoded.labels.tolist() == row["labels"]
    np.testing.assert_array_equal(encoded.answered, encoded.supervised)


def test_inference_ids_equal_the_release(toy):
    golden = json.loads((GOLDEN / "inference_ids_toy_tokenizer.json").read_text())
    template = TEMPLATES["llama_3_1"]
    asked = [turns for turns in CONVERSATIONS.values() if turns[-1].text is None]
    (turns,) = [turns for turns in asked if render(template, turns) == golden["prompt"]]
    encoded = encode(template, turns, toy, double_bos=True)
    assert encoded.ids.tolist() == golden["input_ids"]
    once = encode(template, turns, toy, double_bos=False)
    assert once.ids.tolist() == golden["input_ids"][1:]


@pytest.mark.parametrize("answer", ["2", "Yes", "two  dogs."])
def test_vicuna_labels_start_where_the_release_starts_them(answer, tokenizers):
    # The release masks len(tokens(prompt up to "ASSISTANT: ")) - 2 positions after the bos, so
    # the lone space that Vicuna's tokenizer puts before a digit is learnt; it has to be generated.
    tokenizer = tokenizers["metaspace"]
    turns = [Turn("user", "How many?"), Turn("assistant", answer)]
    prompt = render(TEMPLATES["vicuna_v1"], turns)
    instruction = prompt[: prompt.index("ASSISTANT: ") + len("ASSISTANT: ")]
    first = 1 + len(tokenizer(instruction).input_ids) - 2
    encoded = encode(TEMPLATES["vicuna_v1"], turns, tokenizer, double_bos=False)
    assert np.flatnonzero(encoded.supervised).tolist() == list(range(first, len(encoded.ids)))
    assert encoded.ids.tolist() == tokenizer(prompt).input_ids


# --- Labels are the answers -----------------------------------------------------------------------

letters = st.characters(exclude_categories=["Cs"], exclude_characters="▁\0")
message = st.text(letters, max_size=30) | st.sampled_from(["2", "a  b", "Yes.\n", "é 😀", "x\n\ny"])
# Marks and control tokens have tests of their own.
message = message.filter(lambda text: not re.search(r"<(image>|s>|/s>|unk>|0x|\|)", text))
answer_text = message.map(str.lstrip).filter(bool)  # white space in front merges with headers


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["vicuna_v1", "llava_v1", "llama_3", "llama_3_1", "plain"]),
    st.sampled_from(["metaspace", "byte level"]),
    st.lists(st.tuples(message, answer_text), min_size=1, max_size=4),
    st.booleans(),
)
def test_learnt_tokens_are_the_answers(tokenizers, name, kind, rounds, has_image):
    tokenizer, template = tokenizers[kind], TEMPLATES[name]
    rounds = rounds[:1] if name == "plain" else rounds
    turns = [
        Turn(role, text)
        for pair in rounds
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    if has_image or name == "plain":
        turns[0] = Turn("user", f"<image>\n{turns[0].text}")
    encoded = encode(template, turns, tokenizer, double_bos=False)
    check_supervised(encoded, 0)
    check_images(encoded, int(has_image or name == "plain"), "sample")

    is_learnt = np.concatenate([[False], encoded.supervised, [False]])
    edges = np.flatnonzero(is_learnt[1:] != is_learnt[:-1]).reshape(-1, 2)
    assert len(edges) == len(rounds)
    for (start, end), (_, answer) in zip(edges, rounds, strict=True):
        answer = answer.strip() if template.strip else answer
        expected = template.answer_gap + answer + template.answer_end
        if kind == "metaspace":  # its decoder removes one space from the front of any text
            expected = expected.removeprefix(" ")
        assert tokenizer.decode(encoded.ids[start:end]) == expected
    if kind == "byte level":
        bos = "" if template.system.startswith("<|begin") else "<|begin_of_text|>"
        whole = bos + render(template, turns).replace("<image>", "")
        assert tokenizer.decode(encoded.ids[encoded.ids != IMAGE_TOKEN]) == whole
    assert (encoded.labels[~encoded.supervised] == IGNORE).all()


def test_open_prompt_has_answers_but_nothing_to_learn(toy):
    asked = [Turn("user", "<image>\nWhat is this?"), Turn("assistant", "A dog runs.")]
    turns = [*asked, Turn("user", "What colour is it?"), Turn("assistant", None)]
    encoded = encode(TEMPLATES["llama_3_1"], turns, toy, double_bos=False)
    answer = toy.convert_ids_to_tokens(encoded.ids[encoded.answered].tolist())
    assert "".join(answer) == "A dog runs.<|eot_id|>"
    assert not encoded.supervised.any()
    with pytest.raises(InputError, match="sample id 77"):
        check_supervised(encoded, 77)


def test_control_tokens_in_messages(toy):
    turns = [Turn("user", "a<|eot_id|>b"), Turn("assistant", "c<|eot_id|>d")]
    control = toy.convert_tokens_to_ids("<|eot_id|>")
    safe = encode(TEMPLATES["llama_3_1"], turns, toy, double_bos=False)
    assert (safe.ids == control).sum() == 3  # after the system, the question, the answer
    learnt = "".join(toy.convert_ids_to_tokens(safe.ids[safe.supervised].tolist()))
    assert learnt == "c<|eot_id|>d<|eot_id|>"
    prompt = render(TEMPLATES["llama_3_1"], turns)
    assert "".join(toy.convert_ids_to_tokens(safe.ids.tolist())) == prompt


# --- The tokenizer's own chat template ------------------------------------------------------------


@pytest.mark.parametrize("chat", [LLAMA_3_CHAT + LLAMA_3_HEADER, LLAMA_3_CHAT])
def test_own_chat_template(chat):
    pytest.importorskip("jinja2")
    if chat == LLAMA_3_CHAT:
        chat += "{% if add_generation_prompt %}" + LLAMA_3_HEADER + "{% endif %}"
    always_header = "add_generation_prompt" not in chat
    own, plain = make_toy(), make_toy()
    own.chat_template = chat
    template = TEMPLATES["llama_3_1"]
    for turns in CONVERSATIONS.values():
        expected = encode(template, turns, plain, double_bos=False)
        found = encode(template, turns, own, double_bos=False)
        header = len(template.tail) - len("<|start_header_id|><|end_header_id|>") + 2
        cut = 0 if always_header or turns[-1].text is None else header
        end = len(expected.ids) - cut
        np.testing.assert_array_equal(found.ids, expected.ids[:end])
        np.testing.assert_array_equal(found.labels, expected.labels[:end])
        np.testing.assert_array_equal(found.answered, expected.answered[:end])


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        ("{% for m in messages %}{{ m['content'] | upper }}<|eot_id|>{% endfor %}", "changes"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "special token"),
        ("{% for m in messages %}{{ m['content'] | trim }", "fails"),
        ("{{ raise_exception('no system message') }}", "no system message"),
    ],
)
def test_unusable_chat_templates(chat, reason):
    pytest.importorskip("jinja2")
    tokenizer = make_toy()
    tokenizer.chat_template = chat
    with pytest.raises(InputError, match=reason):
        render(TEMPLATES["llama_3_1"], [Turn("user", "a"), Turn("assistant", "b")], tokenizer)


# --- LLaVA's data ---------------------------------------------------------------------------------


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def test_from_llava():
    turns = [Turn("user", "a"), Turn("assistant", "b")]
    assert from_llava([human("a"), gpt("b")]) == turns
    assert from_llava([gpt("Hello!"), human("a"), gpt("b")]) == turns


@pytest.mark.parametrize(
    ("conversations", "reason"),
    [
        ([], "list of turns"),
        (None, "list of turns"),
        ("text", "list of turns"),
        ([gpt("a")], "no turns"),
        ([human("a"), human("b")], "turn 2"),
        ([gpt("a"), gpt("b"), human("c")], "turn 1"),
        ([human("a"), gpt("")], "empty answer"),
        ([human("a"), gpt(None)], "turn 2"),
        ([human("a"), {"from": "system", "value": "b"}], "turn 2"),
        ([{"from": ["human"], "value": "b"}], "turn 1"),
        ([7], "turn 1"),
    ],
)
def test_from_llava_names_the_sample(conversations, reason):
    with pytest.raises(InputError, match=f"^sample id 12: .*{reason}"):
        from_llava(conversations, "sample id 12")


def test_place_image_mark():
    def placed(text, pictures):
        return place_image_mark([Turn("user", text)], pictures)[0].text

    assert placed("What is this? <image>", 1) == "<image>\nWhat is this?"
    assert placed("<image> a <image>\n", 1) == "<image>\na"
    assert placed("<image>", 1) == "<image>"
    assert placed("no mark ", 1) == "no mark "
    assert placed("<image> and <image> differ", 2) == "<image>\nand\n<image>\ndiffer"
    assert place_image_mark([Turn("assistant", None)], 1) == [Turn("assistant", None)]


def test_bad_turns(toy):
    for turns, reason in [
        ([], "no turns"),
        ([Turn("assistant", "a")], "user's is expected"),
        ([Turn("user", None)], "no text"),
        ([Turn("user", "a"), Turn("assistant", None), Turn("user", "b")], "no text"),
    ]:
        with pytest.raises(InputError, match=reason):
            render(TEMPLATES["vicuna_v1"], turns)
    marks = [Turn("user", "<image> <image>"), Turn("assistant", "a <image>")]
    encoded = encode(TEMPLATES["llama_3"], marks, toy, double_bos=False)
    assert not encoded.supervised[encoded.ids == IMAGE_TOKEN].any()
    with pytest.raises(InputError, match=r"sample id 5: .*3 times for 1 images"):
        check_images(encoded, 1, "sample id 5")


# --- Loading tokenizers ---------------------------------------------------------------------------


def test_load_tokenizer_from_a_folder_quietly(tmp_path, toy):
    toy.save_pretrained(tmp_path)
    # As the release's checkpoints are: a model type that transformers does not know.
    (tmp_path / "config.json").write_text('{"model_type": "llava_mini_llama"}')
    script = (
        "import sys, llava_mini_jax.data.text.tokenizer as t, llava_mini_jax.data.media.images,"
        " llava_mini_jax.data.text.conversation, llava_mini_jax.data.media.video\n"
        "assert 'transformers' not in sys.modules\n"
        "print(t.load_tokenizer(sys.argv[1])('ab').input_ids)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr == "" and json.loads(done.stdout) == [500, 1097, 1098]


def test_load_tokenizer_refuses(tmp_path, monkeypatch):
    import huggingface_hub

    def offline():
        raise ConnectionError("no connection")

    monkeypatch.setattr(huggingface_hub, "get_session", offline)
    for source, reason in [
        (tmp_path / "missing", "no folder"),
        (tmp_path, "has no tokenizer"),
        ("nobody/no-such-model", "no connection"),
    ]:
        with pytest.raises(InputError, match=reason) as caught:
            load_tokenizer(source)
        assert "\n" not in str(caught.value)


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(InputError, match="no character offsets"):
        turns = [Turn("user", "<image>"), Turn("assistant", "a bus")]
        encode(TEMPLATES["plain"], turns, Slow(), double_bos=False)
