"""Every compressor in the engine: the tokens of a whole sequence, in company, and in sessions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_mini_jax import params as param_tree
from llava_mini_jax import sharding
from llava_mini_jax.data.text.conversation import Turn
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference import bounds, places, recompute, seeing_programs
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.engine import Engine, media_of
from llava_mini_jax.inference.lane import LaneSize
from llava_mini_jax.inference.model import Model, answer_all
from llava_mini_jax.inference.session import Session
from llava_mini_jax.inference.ticket import Request
from llava_mini_jax.models import compressors, llama, llava_mini
from llava_mini_jax.models.compressors import fastv
from llava_mini_jax.models.llava_mini import _placed
from llava_mini_jax.ops.layers import some_layers
from llava_mini_jax.ops.norm import rms_norm
from tests import tiny, tiny_model
from tests.inference.steps import said
from tests.tiny_compressors import METHODS, model

fast_compilation = tiny.fast_compilation

# "fastv" is the variant that selects anew for every token.
CACHED = [name for name in METHODS if name not in ("fastv", "llama_vid")]
ASKED = [("what", (1,)), ("which digit is in row 2 column 1 ?", ()), ("read the page", (2, 3))]
TOKENS = 6
QUICK = {"prumerge", "voco"}  # a model each


def requests(model: Model) -> list:
    return [
        model.request(text, model.read_pictures([tiny_model.picture(n) for n in shown], None))
        for text, shown in ASKED
    ]


def quick(name: str) -> Any:
    """A method, marked slow where another one of few tokens goes the same way."""
    return name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [quick(name) for name in CACHED])
def test_the_engine_says_what_whole_sequences_do(name: str) -> None:
    """Token by token, in company and alone, with images of different numbers of tokens."""
    opened, settings = model(name), Settings(max_new_tokens=TOKENS)
    examples = requests(opened)
    whole = answer_all(recompute.answering, opened, examples, [settings] * 3, 4)
    together = said(opened, examples, settings, slots=2)
    assert together.answers == whole
    assert len({tuple(ids) for ids in together.ids}) == 3
    assert said(opened, examples[2:], settings).ids == together.ids[2:]


CHANGES = {"fastv": dict(variant="drop")}


@pytest.mark.parametrize("name", ["prumerge", "voco", "voco, a token of the LLM's", "fastv"])
def test_a_follow_up_is_what_a_fresh_request_is(name: str, monkeypatch) -> None:
    opened, looked = model(name, **CHANGES.get(name, {})), []
    see = seeing_programs.encode_vision
    monkeypatch.setattr(
        seeing_programs, "encode_vision", lambda *given: looked.append(1) or see(*given)
    )
    settings = Settings(max_new_tokens=TOKENS)
    session = Session(opened, settings)
    session.show_image(tiny_model.picture(2))
    for question in ("what", "read the page", "which digit"):
        before = list(session.turns)
        given = "".join(session.ask(question))
        times = len(looked)
        text = question if before else f"<image>\n{question}"
        turns = [*before, Turn("user", text), Turn("assistant", None)]
        assert given == opened.generate(turns, tiny_model.picture(2), max_new_tokens=TOKENS)
        looked[:] = looked[:times]
    # What was made for one question is of no use to another one.
    assert len(looked) == (1 if opened.bundle.model.declared.reusable else 3)


def test_a_picture_takes_the_positions_that_it_has_tokens_for() -> None:
    opened = model("prumerge")
    most = opened.bundle.model.tokens_per_image(1)
    taken = []
    for number in range(1, 5):
        example = opened.request("what", opened.read_pictures(tiny_model.picture(number), None))
        engine = Engine(opened, [LaneSize(1, 64)])
        asked = Request(example, media_of(example), Settings(max_new_tokens=1))
        ticket = engine.submit(asked, lambda news: None)
        while engine.step():
            pass
        taken.append(ticket.usage.image)
        assert ticket.usage.prompt == len(example.ids) - 1 + taken[-1]
    assert len(set(taken)) > 1 and max(taken) <= most


def test_pictures_that_share_a_ratio_are_asked_about_one_at_a_time() -> None:
    opened = model("prumerge", variant="release")
    own = model("prumerge")
    settings, examples = Settings(max_new_tokens=2), requests(own)
    # Alone, the shared ratio is each image's own.
    assert said(opened, examples[:2], settings).ids == said(own, examples[:2], settings).ids
    with pytest.raises(InputError, match=r"shares one ratio .* and the prompt has 2: give one"):
        said(opened, examples[2:], settings)


@pytest.mark.parametrize("variant", ["clean", "release"])
def test_a_picture_s_cache_is_dropped_behind_its_voco_tokens(variant: str) -> None:
    """A slot that holds none of the patches is long enough, and its answer the whole sequence's."""
    opened = model("voco", variant=variant)
    patches, settings = opened.bundle.model.patches_per_image(1), Settings(max_new_tokens=TOKENS)
    example = requests(opened)[0]
    needed = places.needed(example, opened.bundle)
    assert needed <= bounds.prompt_positions(example, opened.bundle) - patches
    whole = answer_all(recompute.answering, opened, [example], [settings], 1)
    engine = Engine(opened, [LaneSize(2, needed + TOKENS)])
    heard = []
    engine.submit(Request(example, media_of(example), settings), heard.append)
    while engine.step():
        pass
    assert heard[-1].answer == whole[0]
    llm = opened.bundle.model.llm
    bytes_ = 2 * 2 * 4 * llm.layers * llm.kv_heads * llm.head_width * (needed + TOKENS)
    assert bytes_ <= engine.cache_bytes() < bytes_ + 100
    with pytest.raises(InputError, match=f"needs {needed} positions"):
        Engine(opened, [LaneSize(1, needed)]).submit(
            Request(example, media_of(example), settings), heard.append
        )


@pytest.mark.parametrize("keep", [5, pytest.param(16, marks=pytest.mark.slow)])
def test_fastv_selects_once_by_the_prompt_s_last_token(keep: int) -> None:
    """Against whole sequences, whose later layers see what the prompt alone has chosen."""
    opened = model("fastv", variant="drop", keep=keep)
    settings, examples = Settings(max_new_tokens=TOKENS), requests(opened)
    expected = [fastv_alone(opened, example) for example in examples]
    assert said(opened, examples, settings, slots=2).ids == expected
    assert said(opened, examples[2:], settings).ids == expected[2:]
    if keep == 16:  # all of them
        plain = model("none")
        assert said(plain, requests(plain), settings).ids == expected


def fastv_alone(opened: Model, example: Any) -> list[int]:
    cfg, ids, known = opened.bundle.model, [], example
    prompt = bounds.prompt_positions(example, opened.bundle)
    how = compressors.How(cfg.llm, "none", "xla")

    @jax.jit
    def logits(params: llava_mini.LlavaMini, inputs: llava_mini.Inputs) -> jax.Array:
        x_BSD, placed = llava_mini.embed_inputs(params, inputs, cfg), _placed(inputs, cfg)
        llm = params.llm
        is_prompt_BS = placed.valid_BS & (jnp.arange(x_BSD.shape[1]) < prompt)
        asked = dataclasses.replace(placed, valid_BS=is_prompt_BS)
        scores_BS = fastv.scores(llm, x_BSD, asked, cfg.compressor, how)
        seen_BS = fastv.kept(scores_BS, asked, cfg.compressor) | (placed.valid_BS & ~is_prompt_BS)
        K = cfg.compressor.layer
        first, rest = some_layers(llm.layers, 0, K), some_layers(llm.layers, K, None)
        x_BSD = llama.run_whole(first, x_BSD, placed.valid_BS, cfg.llm)
        x_BSD = llama.run_whole(rest, x_BSD, seen_BS, cfg.llm)
        hidden_BSD = rms_norm(x_BSD, llm.final_norm, cfg.llm.norm_eps)
        return recompute.last_logits(llm, hidden_BSD, inputs.slots_BS)

    for _ in range(TOKENS):
        inputs = recompute.inputs_of([known], opened.bundle, opened.buckets)
        ids.append(int(np.asarray(logits(opened.params, inputs))[0].argmax()))
        known = recompute._longer(known, ids[-1])
    return ids


def test_later_layers_of_fastv_have_smaller_caches() -> None:
    opened = model("fastv", variant="drop")
    engine = Engine(opened, [LaneSize(1, 64)])
    engine_none = Engine(model("none"), [LaneSize(1, 64)])
    cfg = opened.bundle.model
    of_place = 2 * 4 * cfg.llm.kv_heads * cfg.llm.head_width
    less = engine_none.cache_bytes() - engine.cache_bytes()
    assert less == (cfg.llm.layers - 1) * (16 - 5) * of_place - 4  # a number for each slot


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prumerge", "voco", "fastv"])
@pytest.mark.parametrize("mesh", [(2, 1, 1), (1, 1, 2)])
def test_a_mesh_gives_the_same_answers(name: str, mesh: tuple[int, ...]) -> None:
    opened = model(name, **CHANGES.get(name, {}))
    settings, examples = Settings(max_new_tokens=4), requests(opened)
    expected = said(opened, examples, settings, slots=2).ids
    arrays = param_tree.paths(opened.params)
    spec = llava_mini.unrolled(llava_mini.spec(opened.bundle.model))
    with jax.set_mesh(sharding.make_mesh(*mesh)):
        placed = param_tree.map_paths(lambda path, s: sharding.place(arrays[path], s.axes), spec)
        split = dataclasses.replace(opened, params=placed)
        assert said(split, examples, settings, slots=2).ids == expected


@pytest.mark.parametrize("variant", ["clean", "release"])
def test_a_slot_is_used_again_as_far_as_it_holds_what_is_wanted(variant: str) -> None:
    """In front of an image another text, which the image's VoCo tokens have seen."""
    opened, settings = model("voco", variant=variant), Settings(max_new_tokens=TOKENS)
    pictures = opened.read_pictures(tiny_model.picture(1), None)

    def ids(engine: Engine, text: str) -> tuple[list[int], int]:
        example, heard = opened.request(text, pictures), []
        media = tuple(dataclasses.replace(one, key=b"p") for one in media_of(example))
        ticket = engine.submit(Request(example, media, settings), heard.append)
        while engine.step():
            pass
        return [token for piece in heard for token in piece.ids], ticket.usage.cached

    engine, found = Engine(opened, [LaneSize(1, 128)]), []
    for text in ("row <image> what", "row <image> what", "digit <image> what", "<image> read"):
        found.append(ids(engine, text))
        assert found[-1][0] == ids(Engine(opened, [LaneSize(1, 128)]), text)[0]
    again = [cached for _, cached in found]
    # The text in front of the image is in the slot, unless it has left with the image.
    assert again[0] == 0 < again[1] and (again[2] > 0) == (variant == "clean")
