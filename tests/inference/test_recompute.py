"""Answers without a KV cache, and the model that needs them: compression inside the LLM."""

import dataclasses

import jax
import numpy as np
import pytest

from llava_mini_jax import params as param_tree
from llava_mini_jax import sharding
from llava_mini_jax.data.digits.pages import build_tokenizer
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference import bounds, recompute
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.model import Model
from llava_mini_jax.inference.recompute import refuse_inside, refuse_question
from llava_mini_jax.inference.sampling import make_sampling
from llava_mini_jax.inference.session import Session
from llava_mini_jax.models import llava_mini
from llava_mini_jax.models.compressors.prumerge import PruMergeConfig
from tests import tiny, tiny_model
from tests.tiny_compressors import METHODS

fast_compilation = tiny.fast_compilation

QUESTIONS = ["what", "which digit is in row 2 column 1 ?", "read the page"]
PICTURES = [[tiny_model.picture(1)], None, [tiny_model.picture(2), tiny_model.picture(3)]]


def inside(positions: int | None = None) -> Model:
    """A model that compresses inside the language model."""
    bundle = tiny_model.bundle("paper")
    llm = dataclasses.replace(bundle.model.llm, layers=2)
    if positions:
        llm = dataclasses.replace(llm, max_positions=positions)
    cfg = tiny.model("paper", llm, bundle.model.vision, grid=1, inside_layers=1)
    bundle = dataclasses.replace(bundle, model=cfg)
    params = llava_mini.unrolled(tiny_model.weights(bundle))
    return Model(params, bundle, build_tokenizer(), bounds.buckets_for(bundle))


@pytest.fixture(scope="module")
def model() -> Model:
    return inside()


def requests(model: Model):
    return [
        model.request(question, model.read_pictures(shown, None))
        for question, shown in zip(QUESTIONS, PICTURES, strict=True)
    ]


@pytest.mark.parametrize("how", [{}, dict(temperature=1.5, top_p=0.9, seed=3)])
def test_a_cache_gives_the_same_answers(how):
    import llava_mini_jax

    plain = llava_mini_jax.load(tiny_model.folder("release"))
    settings = Settings(max_new_tokens=6, **how)
    asked = requests(plain)
    expected = plain.answer_requests(asked, settings, batch_size=4)
    texts = [
        bounds.empty_text(one, plain.bundle, plain.tokenizer, plain.stop_ids, settings)
        for one in asked
    ]
    rows = [*asked, *recompute.padding_rows(asked)]
    seeds = [*settings.seeds(3), 0]
    sampling = make_sampling(4, settings.temperature, settings.top_p, 0, seeds, ())
    logits = recompute.whole_model(plain.params, plain.bundle, plain.buckets)
    pieces = list(recompute.decode(logits, rows, texts, sampling))
    assert [text.answer for text in texts] == expected
    assert ["".join(row) for row in zip(*pieces, strict=True)] == [a.text for a in expected]
    assert len({answer.text for answer in expected}) > 1


def compressed(compressor) -> Model:
    """A model of the folder's sizes with another compressor."""
    bundle = tiny_model.bundle("paper")
    old = bundle.model
    cfg = tiny.model("paper", old.llm, old.vision, compressor=compressor, prefusion_layers=1)
    bundle = dataclasses.replace(bundle, model=cfg)
    params = llava_mini.unrolled(tiny_model.weights(bundle))
    return Model(params, bundle, build_tokenizer(), bounds.buckets_for(bundle))


def test_pictures_of_different_numbers_of_tokens_are_answered():
    own = PruMergeConfig(layer=1, neighbours=5, ratio=0.0, variant="clean")
    model = compressed(own)
    answers_are_of_the_logits(model)
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(InputError, match='"prumerge" is defined on images, and a video is given'):
        model.generate(QUESTIONS[0], videos=frames)


def test_a_fixed_number_of_chosen_tokens_keeps_a_cache():
    model = compressed(PruMergeConfig(layer=1, neighbours=5, ratio=0.25, variant="release"))
    refuse_inside(model.bundle.model)
    answers_are_of_the_logits(model)


def test_a_question_where_pictures_are_seen_without_one():
    cfg = tiny.model("paper", compressor=METHODS["llama_vid"], prefusion_layers=0)
    refuse_inside(cfg)
    with pytest.raises(InputError, match='"llama_vid" reads the question about an image'):
        refuse_question(cfg)


def test_compression_inside_answers_what_its_logits_say(model):
    answers_are_of_the_logits(model)


def answers_are_of_the_logits(model):
    """Token by token against the training model's logits, of each row alone."""
    answers = model.generate(QUESTIONS, PICTURES, max_new_tokens=5)
    for question, shown, answer in zip(QUESTIONS, PICTURES, answers, strict=True):
        example, ids = model.request(question, model.read_pictures(shown, None)), []
        for _ in range(5):
            inputs = tiny.batch([example], model.bundle.model, buckets=model.buckets).inputs
            last = int((np.asarray(inputs.slots_BS) >= 0).sum()) - 1
            ids.append(int(tiny.logits(model.params, inputs, model.bundle.model)[0, last].argmax()))
            example = recompute._longer(example, ids[-1])
        assert model.tokenizer.decode(ids, skip_special_tokens=True).strip() == answer
    assert len(set(answers)) > 1


def test_it_streams_and_has_no_sessions(model):
    whole = model.generate(QUESTIONS[0], PICTURES[0], max_new_tokens=5)
    assert "".join(model.stream(QUESTIONS[0], PICTURES[0], max_new_tokens=5)) == whole
    with pytest.raises(InputError, match=r"use Model.generate or eval.py"):
        Session(model)


def test_all_patches_count_against_its_positions():
    """Its first layers read every patch, however few tokens the later ones see."""
    patches = inside().bundle.model.patches_per_image(1)
    small = inside(positions=patches)
    with pytest.raises(InputError, match="for images"):
        small.generate(QUESTIONS[0], PICTURES[0])


@pytest.mark.parametrize("mesh", [(2, 1, 1), (1, 1, 2)])
def test_a_mesh_gives_the_same_answers(model, mesh):
    expected = model.generate(QUESTIONS, PICTURES, max_new_tokens=4)
    arrays = param_tree.paths(model.params)
    spec = llava_mini.unrolled(llava_mini.spec(model.bundle.model))
    with jax.set_mesh(sharding.make_mesh(*mesh)):
        placed = param_tree.map_paths(lambda path, s: sharding.place(arrays[path], s.axes), spec)
        split = dataclasses.replace(model, params=placed)
        assert split.generate(QUESTIONS, PICTURES, max_new_tokens=4) == expected
