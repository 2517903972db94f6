"""A compressor that reads the question: requests, sessions, films and training give its ids."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from llava_mini_jax.data.batches import questions
from llava_mini_jax.data.batches.examples import (
    BatchLayout,
    Buckets,
    collate,
    grow,
    sizes_of,
)
from llava_mini_jax.data.batches.pipeline import Encoder
from llava_mini_jax.data.digits.pages import build_tokenizer
from llava_mini_jax.data.text import question_ids
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference import bounds, recompute
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.model import Model, answer_all
from llava_mini_jax.inference.session import Session
from llava_mini_jax.models import llava_mini
from tests import tiny, tiny_model
from tests.tiny_compressors import METHODS

fast_compilation = tiny.fast_compilation

ASKED = ["what", "which digit is in row 2 ?", "read the page"]
IDS = 8  # of a question, at most


@functools.cache
def model() -> Model:
    """LLaMA-VID, whose questions are read by the digits world's tokenizer."""
    bundle, tokenizer = tiny_model.bundle("paper"), build_tokenizer()
    own = dataclasses.replace(
        METHODS["llama_vid"], qformer_vocabulary=len(tokenizer), qformer_positions=IDS
    )
    old = bundle.model
    cfg = tiny.model("paper", old.llm, old.vision, compressor=own, prefusion_layers=0)
    question_ids.give(tokenizer, question_ids.reader_of_words(tokenizer, cfg.declared))
    bundle = dataclasses.replace(bundle, model=cfg)
    params = llava_mini.unrolled(tiny_model.weights(bundle))
    return Model(params, bundle, tokenizer, bounds.buckets_for(bundle))


def ids_of(text: str) -> list[int]:
    return question_ids.reader_of(model().tokenizer)(text).tolist()


def without_cache(examples: list, settings: Settings) -> list[str]:
    """The whole model's, which collates the questions itself."""
    answers = answer_all(recompute.answering, model(), examples, [settings] * len(examples), 4)
    return [answer.text for answer in answers]


def test_the_engine_answers_as_the_whole_model_does() -> None:
    """Of one image three questions are three images; beside each other, and alone."""
    page = tiny_model.picture(1)
    shown = [[page], [page], [tiny_model.picture(2), page]]
    settings = Settings(max_new_tokens=6)
    examples = [
        model().request(text, model().read_pictures(images, None))
        for text, images in zip(ASKED, shown, strict=True)
    ]
    assert [[list(q) for q in e.questions] for e in examples] == [
        [ids_of(ASKED[0])],
        [ids_of(ASKED[1])],
        [ids_of(ASKED[2])] * 2,
    ]
    expected = without_cache(examples, settings)
    found = model().answer_requests(examples, settings, batch_size=3)
    assert [answer.text for answer in found] == expected


def tokens(picture: np.ndarray, text: str) -> np.ndarray:
    """The visual tokens [Q, D] of an image that is looked at for a question."""
    params, cfg = tiny.on_device(model().params), model().bundle.model
    seen = llava_mini.encode_vision(params, model().read_pictures([picture], None).pixels, cfg)
    asked = questions.padded(np.array(ids_of(text), np.int32), IDS)[None]
    seen = dataclasses.replace(seen, question_IT=asked)
    return np.asarray(llava_mini.project_and_compress(params, seen, cfg)[1].tokens_IQE[0])


def test_a_film_is_looked_at_for_its_question() -> None:
    frames = np.stack([tiny_model.picture(n) for n in range(3)])
    example = model().request(ASKED[1], model().read_pictures(None, frames))
    assert example.frames == (3,) and len(example.questions) == 1
    settings = Settings(max_new_tokens=5)
    session = Session(model(), settings, chunk=2)
    session.show_video(frames)
    assert session.answer_alone(ASKED[1]).text == without_cache([example], settings)[0]


def test_a_follow_up_question_looks_anew() -> None:
    """The image's tokens are the newest question's, wherever the image stands."""
    page = tiny_model.picture(1)
    session = Session(model(), Settings(max_new_tokens=4))
    session.show_image(page)
    first, second = ("".join(session.ask(text)) for text in ASKED[:2])
    assert session._engine is not None
    known = [seen.settled()[0][0] for seen in session._engine.gallery._known.values()]
    for tokens_QD, text in zip(known, ASKED, strict=False):
        np.testing.assert_allclose(tokens_QD, tokens(page, text), atol=1e-5)
    assert len(known) == 2 and np.abs(known[0] - known[1]).max() > 1e-3
    assert session._ticket is not None and session._ticket.usage.recalled == 0
    turns = [*session.turns[:-1], dataclasses.replace(session.turns[-1], text=None)]
    example = model().request(turns, model().read_pictures([page], None))
    assert example.questions[0].tolist() == ids_of(ASKED[1])
    assert without_cache([example], Settings(max_new_tokens=4)) == [second]
    # Asked again, the image is known for this question.
    session.new_conversation()
    assert "".join(session.ask(ASKED[0])) == first
    assert session._ticket.usage.recalled == 1


def test_pictures_without_a_question() -> None:
    with pytest.raises(InputError, match="turn 1 has no text: add a question"):
        model().generate("<image>\n", images=[tiny_model.picture(1)])
    assert model().request("what", model().read_pictures(None, None)).questions == ()


def test_training_looks_at_a_picture_for_every_question() -> None:
    bundle = model().bundle
    encode = Encoder(model().tokenizer, bundle.prompt, bundle.images)
    talk = [
        {"from": "human", "value": "what\n<image>"},
        {"from": "gpt", "value": "a page"},
        {"from": "human", "value": "which digit ?"},
        {"from": "gpt", "value": "1"},
    ]
    sample = dict(id="a", image=tiny_model.picture(1), conversations=talk)
    twice = encode(sample)
    assert twice.frames == (1, 1) and len(twice.pixels) == 2
    assert [q.tolist() for q in twice.questions] == [ids_of("what"), ids_of("which digit ?")]
    np.testing.assert_array_equal(twice.pixels[0], twice.pixels[1])
    film = np.stack([tiny_model.picture(n) for n in range(3)])
    filmed = encode(dict(id="b", frames=film, conversations=talk[:2]))
    text = encode(dict(id="c", conversations=talk[2:]))
    assert text.questions == () and filmed.frames == (3,)
    layout = BatchLayout.of(
        bundle.model,
        1,
        buckets=Buckets(lengths=(64, 128), images=(1, 2, 4)),
        padding_side="right",
        max_length=128,
    )
    batch = collate([twice, filmed, text], layout, truncate=False)
    asked = np.asarray(batch.inputs.question_BIT)
    assert asked.shape == (3, 4, IDS)
    rows = [[row[row >= 0].tolist() for row in rows] for rows in asked]
    what = ids_of("what")
    assert rows == [[what, ids_of("which digit ?"), [], []], [what] * 3 + [[]], [[]] * 4]
    loss, _ = tiny.loss_and_grads(model().params, batch, bundle.model)
    assert np.isfinite(loss)
    # Beside rows of other processes it is what it would have been.
    alone = collate([twice], layout, truncate=False)
    whole = collate([twice, filmed], layout, truncate=False)
    grown = grow(alone, sizes_of(whole), "right")
    np.testing.assert_array_equal(grown.inputs.question_BIT[0], whole.inputs.question_BIT[0])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.shape[1:], b.shape[1:]), grown, whole)
    wordless = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a page"}]
    with pytest.raises(InputError, match="turn 1 has no text: add a question"):
        encode(sample | dict(conversations=wordless))
