"""Token ids to text: pieces are final and whole, wherever the ids are cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llava_mini_jax.inference.answer import AnswerText


class Bytes:
    """A tokenizer whose tokens are bytes; the decoders of Llama 3 and Vicuna treat halves alike."""

    @property
    def backend_tokenizer(self) -> "Bytes":
        return self

    def decode(self, ids: list[int], **_) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


TEXTS = st.text(alphabet="ab é€😀 \n", max_size=20)


@settings(deadline=None)
@given(TEXTS, st.lists(TEXTS.filter(bool), max_size=2), st.lists(st.integers(1, 7), min_size=1))
def test_pieces_are_final_and_whole(text: str, stop: list[str], sizes: list[int]) -> None:
    answer = AnswerText(Bytes(), [0], stop, 1000, "length")
    ids, pieces, position = [*text.encode(), 0, 97, 97], [], 0
    for size in sizes * (len(ids) + 1):
        pieces.append(answer.push(ids[position : position + size]))
        position += size
    assert answer.finish == "stop"
    places = [place for place in (text.find(s) for s in stop) if place >= 0]
    expected = cut_at_first_end(text, stop) if places else text
    assert "".join(pieces) == answer.text == expected.strip()
    assert not any("\ufffd" in piece for piece in pieces)


def cut_at_first_end(text: str, stop: list[str]) -> str:
    """The text before the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        found = [text[:end].find(s) for s in stop]
        if any(place >= 0 for place in found):
            return text[: min(place for place in found if place >= 0)]
    return text


def like_llama_3() -> PreTrainedTokenizerFast:
    """Byte-level BPE, bytes only."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(["<end>", *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


def like_vicuna() -> PreTrainedTokenizerFast:
    """SentencePiece's way: spaces as letters, unknown characters as bytes."""
    tokens = ["<unk>", "<end>", "\u2581", "a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="<unk>")


TOKENIZERS = {"llama 3": like_llama_3(), "vicuna": like_vicuna()}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=50)
@given(text=TEXTS, steps=st.integers(1, 5))
def test_pieces_are_what_tokenizers_decode(name: str, text: str, steps: int) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    answer = AnswerText(tokenizer, [tokenizer.eos_token_id], (), 1000, "length")
    pieces = [answer.push(ids[i : i + steps]) for i in range(0, len(ids), steps)]
    pieces.append(answer.push([tokenizer.eos_token_id]))
    assert "".join(pieces) == text.strip() == tokenizer.decode(ids).strip()


def test_half_a_character_at_the_end_is_left_out() -> None:
    answer = AnswerText(Bytes(), [0], (), 3, "length")
    assert answer.push("a€".encode()) == "a" and answer.finish == "length"


WORLD = {
    "joined emoji": "family 👨‍👩‍👧‍👦 flag 🏳️‍🌈 pirate 🏴‍☠️ technologist 👩🏽‍💻 end",
    "chinese": "你好，世界。龘靐齉爩",
    "hindi": "नमस्ते दुनिया क्षत्रिय श्री",
    "combining": "e\u0301 n\u0303 Z\u0337\u0322\u0304a\u0338l\u0336go",
    "thai": "ภาษาไทยสวัสดี",
    "arabic": "مرحبا بالعالم",
    "flags": "🇩🇪🇯🇵🇺🇳 keycap 1️⃣",
    "rare": "𝔘𝔫𝔦 𓀀𓁐 ꧁꧂",
    "code": "for i in range(10):\n    print(f'{i:>3} <b>')",
}


@pytest.mark.parametrize("text", WORLD.values(), ids=WORLD)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_streams_never_show_half_a_character(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    for steps in (1, 2, 3):
        answer = AnswerText(tokenizer, (), (), len(ids), "length")
        pieces = [answer.push(ids[i : i + steps]) for i in range(0, len(ids), steps)]
        assert "".join(pieces) == whole.strip() == text.strip()
        assert not any("\ufffd" in piece for piece in pieces)
    for end in range(1, len(ids)):
        assert "\ufffd" not in AnswerText(tokenizer, (), (), end, "length").push(ids[:end])
