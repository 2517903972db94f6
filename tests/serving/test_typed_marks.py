"""What people type is text: no "<image>" of theirs is an image, no special token acts as one."""

from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, normalizers

from llava_mini_jax.data.text.conversation import IMAGE_TOKEN, TEMPLATES, Turn, encode
from llava_mini_jax.data.text.prompt_text import pieces, render
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference.request import encode_turns, open_turns
from tests import tiny_model
from tests.data.test_chat_template import tokenizer_of
from tests.data.toy_tokenizers import LLAMA_SPECIALS, make_byte_level, make_metaspace, make_toy

OPEN = Turn("assistant", None)
CHAT = (  # every message trimmed
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}<|start_header_id|>"
)


def with_image(tokenizer: Any, *, special: bool) -> Any:
    tokenizer.add_tokens([AddedToken("<image>", special=special)], special_tokens=special)
    return tokenizer


def greedy(tokenizer: Any) -> Any:
    """Its tokens take the white space around them, as Phi-3's and RoBERTa's do."""
    names = [AddedToken("<mask>", lstrip=True, rstrip=True), AddedToken("<|end|>", rstrip=True)]
    tokenizer.add_tokens(names, special_tokens=True)
    return tokenizer


def lower_case() -> Any:
    """It looks for its tokens in small letters of plain width."""
    tokenizer = make_byte_level()
    core = tokenizer.backend_tokenizer
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.add_tokens([AddedToken("<sep>", normalized=True)], special_tokens=True)
    return tokenizer


TOKENIZERS = {
    "toy": make_toy,
    "metaspace": make_metaspace,
    "byte level": make_byte_level,
    "metaspace, published": lambda: with_image(make_metaspace(), special=True),
    "byte level, published": lambda: with_image(make_byte_level(), special=True),
    "byte level, added": lambda: with_image(make_byte_level(), special=False),
    "byte level, greedy": lambda: greedy(make_byte_level()),
    "metaspace, greedy": lambda: greedy(make_metaspace()),
    "lower case": lower_case,
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {name: make() for name, make in TOKENIZERS.items()}


def special_ids(tokenizer: Any) -> dict[str, int]:
    """All but what stands for unknown letters and for bytes, which any text may hold."""
    unknown = tokenizer.backend_tokenizer.model.unk_token
    known = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return {n: i for n, i in known.items() if n != unknown and not n.startswith("<0x")}


def ids_of(tokenizer: Any, text: str, marks: tuple[int, ...] | None, name: str) -> np.ndarray:
    turns = [Turn("user", text, marks), OPEN]
    return encode(TEMPLATES[name], turns, tokenizer, double_bos=False).ids


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", ["vicuna_v1", "llama_3", "llama_3_1"])
def test_a_typed_special_token_is_its_letters(tokenizers, name, template):
    tokenizer = tokenizers[name]
    special = special_ids(tokenizer)
    plain = ids_of(tokenizer, "hi", (), template)
    own = sorted(i for i in plain if i in special.values())
    for token in [*special, "<image>", "<SEP>", "＜sep＞", *LLAMA_SPECIALS]:
        for text in (f"hi {token}", f"{token} hi", f"a{token}b", f" {token} ", token * 3):
            found = ids_of(tokenizer, text, (), template)
            assert sorted(i for i in found if i in special.values()) == own, text
            assert IMAGE_TOKEN not in found
            image = tokenizer.added_tokens_encoder.get("<image>")
            assert image is None or image not in found


@pytest.mark.parametrize("name", ["toy", "byte level", "byte level, published"])
def test_the_letters_of_a_typed_token_are_all_there(tokenizers, name):
    tokenizer = tokenizers[name]
    for token in ["<image>", *special_ids(tokenizer)]:
        turns = [Turn("user", f"a {token} b", ()), OPEN]
        found = encode(TEMPLATES["llama_3"], turns, tokenizer, double_bos=False).ids.tolist()
        written = (
            "".join(tokenizer.convert_ids_to_tokens(found))
            if name == "toy"
            else tokenizer.decode(found, clean_up_tokenization_spaces=False)
        )
        assert written == render(TEMPLATES["llama_3"], turns)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_marks_say_where_pictures_stand(tokenizers, name):
    tokenizer, text = tokenizers[name], "<image> a <image>\n b <image>"
    for marks, count in [(None, 3), ((), 0), ((10,), 1), ((0, 21), 2)]:
        found = ids_of(tokenizer, text, marks, "vicuna_v1")
        assert (found == IMAGE_TOKEN).sum() == count
    every = ids_of(tokenizer, text, (0, 10, 21), "vicuna_v1")
    np.testing.assert_array_equal(every, ids_of(tokenizer, text, None, "vicuna_v1"))


@pytest.mark.parametrize(
    ("template", "chat"), [("llama_3_1", ""), ("vicuna_v1", ""), ("plain", ""), ("chat", CHAT)]
)
def test_marks_keep_their_place_where_text_is_stripped(template, chat):
    tokenizer = tokenizer_of(chat) if chat else make_byte_level()
    turns = [Turn("user", " \n <image> <image> x ", (11,)), OPEN]
    parts = pieces(TEMPLATES[template], turns, tokenizer)
    marks = [part.text[mark : mark + 7] for part in parts for mark in part.marks]
    assert marks == ["<image>"]
    encoded = encode(TEMPLATES[template], turns, tokenizer, double_bos=False)
    assert (encoded.ids == IMAGE_TOKEN).sum() == 1
    before = tokenizer.decode(encoded.ids[: int(np.argmax(encoded.ids == IMAGE_TOKEN))])
    assert before.endswith("" if template == "plain" else "<image> ")


def test_answers_of_earlier_turns_hold_no_picture():
    turns = [
        Turn("user", "<image> what?", (0,)),
        Turn("assistant", "an <image></s>", ()),
        Turn("user", "and?", ()),
    ]
    bundle = tiny_model.bundle("paper")
    tokenizer = tiny_model.build_tokenizer()
    encoded = encode_turns(open_turns(turns, 1, "it"), 1, bundle, tokenizer, "it")
    assert (encoded.ids == IMAGE_TOKEN).sum() == 1


def test_pictures_without_a_mark_stand_in_front():
    (turn, _) = open_turns([Turn("user", "typed <image>", ())], 2, "it")
    assert turn == Turn("user", "<image>\n<image>\ntyped <image>", (0, 8))
    bundle, tokenizer = tiny_model.bundle("paper"), tiny_model.build_tokenizer()
    encoded = encode_turns([turn, OPEN], 2, bundle, tokenizer, "it")
    assert (encoded.ids == IMAGE_TOKEN).sum() == 2


@pytest.mark.parametrize("marks", [(1,), (-7,), (0, 0), (10, 0), (0, 3), (99,)])
def test_marks_where_nothing_stands_are_refused(marks):
    with pytest.raises(InputError, match="turn 1 has a mark at character"):
        render(TEMPLATES["vicuna_v1"], [Turn("user", "<image> a <image>", marks), OPEN])
