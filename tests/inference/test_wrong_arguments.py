"""Arguments of the wrong shape or type: one sentence, whatever they are."""

import numpy as np
import pytest
from PIL import Image

import llava_mini_jax
from llava_mini_jax import InputError, Session
from llava_mini_jax.data.text.conversation import Turn
from llava_mini_jax.inference import prompt_template
from tests import tiny, tiny_model

fast_compilation = tiny.fast_compilation

FRAME = np.zeros((8, 6, 3), np.uint8)
ARRAYS = (
    np.zeros((), np.uint8),
    np.zeros(3, np.uint8),
    np.zeros((8, 6), np.uint8),
    np.zeros((8, 6, 4), np.uint8),
    np.zeros((8, 6, 3), np.float32),
    np.zeros((8, 6, 3), np.int64),
    np.zeros((0, 6, 3), np.uint8),
    np.zeros((8, 0, 3), np.uint8),
    np.zeros((1, 1, 8, 6, 3), np.uint8),
    np.array([None, 1], object),
    np.array(["a.png", "b.png"]),
)
ODD = (
    *(1, 2.5, True, {}, {"a": "a.png"}, {"a.png"}, object(), ("a.png",), ["a.png"], [["a.png"]]),
    *([1], [None], [[1]], [[None]], [b""], [""], [{}], [[FRAME]], [[[FRAME]]], bytearray(b"x")),
    *(memoryview(b"x"), range(3), Image, Turn, Turn("user", "x"), b"", "", "\0"),
    *(
        Image.new("RGB", (0, 0)),
        lambda: None,
        float("nan"),
        [ARRAYS],
        *ARRAYS,
        *map(list, [ARRAYS]),
    ),
)


@pytest.fixture(scope="module")
def model():
    return llava_mini_jax.load(tiny_model.folder("paper"))


def told(call, *given, **named):
    """The sentence that a call ends with."""
    with pytest.raises(InputError) as refused:
        call(*given, **named)
    sentence = str(refused.value)
    assert sentence and "\n" not in sentence and " at 0x" not in sentence
    return sentence


@pytest.mark.parametrize("number", range(len(ODD)))
def test_pictures_and_videos(number, model):
    odd = ODD[number]
    told(model.generate, "what?", images=odd)
    told(model.generate, "what?", videos=odd)
    told(model.generate, ["what?", "who?"], images=odd)
    told(model.generate, ["what?", "who?"], images=[odd, None])
    told(model.generate, ["what?", "who?"], videos=[None, odd])
    told(model.stream, "what?", images=odd)
    told(Session(model).show_image, odd)
    told(Session(model).show_video, odd)


PROMPTS = (
    *(None, 1, {}, {"a": 1}, {"a"}, object(), b"what?", [1], [None], [["what?"]], [[]], [b"x"]),
    *(Turn("user", "x"), [Turn("user", "x"), "y"], [Turn("user", "x"), 3], [{"role": "user"}]),
    *([Turn("user", None)], [Turn("user", 5)], [Turn("bogus", "x")], [Turn("assistant", 1)]),  # pyright: ignore
    *(np.array("what?"), np.array(["what?"]), iter(["what?"]), range(2), float("nan")),
)


@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_prompts(number, model):
    odd = PROMPTS[number]
    told(model.generate, odd)
    told(model.stream, odd)
    if not isinstance(odd, list):
        told(lambda: list(Session(model).ask(odd)))


def test_frames_that_are_appended(model):
    session = Session(model)
    session.show_video(np.zeros((2, 8, 6, 3), np.uint8))
    for odd in (None, 1, {}, "a.png", [None], [1], ["a.png"], *(a for a in ARRAYS if a.size)):
        told(session.append_frames, odd)
    assert session.frames == 2


def test_what_is_right_goes_on(model):
    text = model.generate("what?", images=[FRAME], max_new_tokens=2)
    for images in (FRAME, (FRAME,), iter([FRAME]), [Image.fromarray(FRAME)]):
        assert model.generate("what?", images=images, max_new_tokens=2) == text
    both = model.generate(["what?"] * 2, images=np.stack([FRAME, FRAME]), max_new_tokens=2)
    assert both == [text, text]
    assert model.generate([], max_new_tokens=2) == []


def test_a_prompt_without_tokens(model):
    class Nothing:
        """A tokenizer that knows no letter."""

        unk_token_id = eos_token_id = bos_token_id = None

        def __call__(self, text, **_):
            return {"input_ids": [], "attention_mask": []}

        def encode(self, text, **_):
            return []

    template = prompt_template.TEMPLATES["plain"]
    assert prompt_template.end_of_turn(template, Nothing()) is None
