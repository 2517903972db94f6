"""As many vision tokens as a request asks for: beside others, in sessions, and what is refused."""

import dataclasses
from typing import Any

import numpy as np
import pytest

import llava_mini_jax
from llava_mini_jax import InputError, Model, Session, Settings, cli
from llava_mini_jax.inference import recompute, vision_tokens
from llava_mini_jax.inference.engine import Engine, media_of
from llava_mini_jax.inference.gallery import Seen
from llava_mini_jax.inference.lanes import LaneSize
from llava_mini_jax.inference.model import answer_all
from llava_mini_jax.inference.ticket import Medium, Request
from llava_mini_jax.inference.work import mark_visual
from llava_mini_jax.models.compressors import nested
from llava_mini_jax.models.compressors.nested import NestedConfig
from llava_mini_jax.models.compressors.prumerge import PruMergeConfig
from llava_mini_jax.models.compressors.similarity import SimilarityCompressor
from tests import tiny, tiny_model

fast_compilation = tiny.fast_compilation

COUNTS = (0, 1, 4, 9, 16)
LOGPROB_ATOL = 1e-5  # float32, through three towers of one or two layers
QUESTION = "how many 7s are there?"
MORE = "what is the largest digit?"


@pytest.fixture(scope="module")
def model() -> Model:
    return llava_mini_jax.load(tiny_model.folder("nested"))


def plain(count: int, model: Model) -> Model:
    """The model of `count` tokens alone that is in the nested one."""
    cfg = tiny.model(
        "paper", model.bundle.model.llm, model.bundle.model.vision, grid=round(count**0.5),
        prefusion_layers=1,
    )  # fmt: skip
    start = sum(n for n in COUNTS if n < count)
    query = model.params.compressor.query[start : start + count]
    params = dataclasses.replace(model.params, compressor=SimilarityCompressor(query))
    bundle = dataclasses.replace(model.bundle, model=cfg)
    return dataclasses.replace(model, params=params, bundle=bundle)


def test_a_folder_keeps_its_counts(model: Model) -> None:
    compressor: Any = model.bundle.model.compressor
    assert (compressor.kind, compressor.counts, compressor.count) == ("nested", COUNTS, 1)
    expected = tiny_model.weights(tiny_model.bundle("nested")).compressor.query
    np.testing.assert_array_equal(model.params.compressor.query, expected)


def test_requests_of_any_counts_side_by_side_are_what_they_are_alone(model: Model) -> None:
    # Two of one image, whose tokens are kept; longer and shorter ones take turns.
    pictures = [tiny_model.picture(n // 2) for n in range(6)]
    asked: list[int | str | None] = [16, 0, 9, 1, "all", None]
    texts = [QUESTION if n % 2 else MORE for n in range(6)]
    examples = [
        model.request(text, model.read_pictures(picture, None), vision_tokens=count)
        for text, picture, count in zip(texts, pictures, asked, strict=True)
    ]
    lanes = [LaneSize(6, 128)]  # a slot each: what one holds already would be read, not computed
    settings = Settings(max_new_tokens=8, logprobs=2)

    def media(n: int, example) -> list[Medium]:
        one = dataclasses.replace(media_of(example)[0], key=b"%d" % (n // 2))
        return [one]

    def told(numbers: list[int]) -> dict[int, Any]:
        engine, heard = Engine(model, lanes), {n: [] for n in numbers}
        for n in numbers:
            request = Request(examples[n], media(n, examples[n]), settings)
            heard[n].append(engine.submit(request, heard[n].append))
        while engine.step():
            pass
        # An image is looked at once, whatever the counts.
        assert engine.gallery.used()["media"] == len({n // 2 for n in numbers})
        return heard

    together = told(list(range(6)))
    for n in range(6):
        ticket, *pieces = together[n]
        count = {None: 1, "all": 16}.get(asked[n], asked[n])
        assert ticket.usage.image == count
        alone = told([n])[n][1:]
        assert [p.text for p in pieces] and pieces[-1].answer == alone[-1].answer
        ours, theirs = ([t for piece in p for t in piece.tokens] for p in (pieces, alone))
        assert [t.id for t in ours] == [t.id for t in theirs]
        # The tower's products of four images together add in another order than one's.
        np.testing.assert_allclose(
            [t.logprob for t in ours], [t.logprob for t in theirs], atol=LOGPROB_ATOL
        )


@pytest.mark.parametrize("count", COUNTS[1:])
def test_an_answer_is_that_of_the_model_of_so_many_tokens(model: Model, count: int) -> None:
    picture = tiny_model.picture(3)
    ours = model.generate(QUESTION, picture, max_new_tokens=8, vision_tokens=count)
    assert ours == plain(count, model).generate(QUESTION, picture, max_new_tokens=8)


def test_counts_change_answers_and_lists_give_each_prompt_its_own(model: Model) -> None:
    picture = tiny_model.picture(3)
    each = [model.generate(QUESTION, picture, max_new_tokens=8, vision_tokens=n) for n in COUNTS]
    assert len(set(each)) > 2  # else the others would tell nothing
    prompts, pictures = [QUESTION] * 5, [picture] * 5
    listed = model.generate(prompts, pictures, max_new_tokens=8, vision_tokens=list(COUNTS))
    assert listed == each
    pieces = model.stream(QUESTION, picture, max_new_tokens=8, vision_tokens=4)
    assert "".join(pieces) == each[2]
    fewer = llava_mini_jax.load(tiny_model.folder("nested"), vision_tokens=4)
    assert fewer.generate(QUESTION, picture, max_new_tokens=8) == each[2]
    # The model's own, unasked, is 1; and the engine's numbers are those without a cache.
    assert model.generate(QUESTION, picture, max_new_tokens=8) == each[1]
    examples = [
        model.request(QUESTION, model.read_pictures(picture, None), vision_tokens=n) for n in COUNTS
    ]
    own = [Settings(max_new_tokens=8)] * 5
    slowly = answer_all(recompute.answering, model, examples, own, 5)
    assert [answer.text for answer in slowly] == each


def test_a_session_asks_with_a_count_each_time(model: Model) -> None:
    picture = tiny_model.picture(5)
    session = Session(model, Settings(max_new_tokens=6))
    session.show_image(picture)
    for count in (4, 0, None, 16):
        told = session.answer_alone(QUESTION, vision_tokens=count).text
        assert told == model.generate(QUESTION, picture, max_new_tokens=6, vision_tokens=count)
        assert session._ticket is not None
        assert session._ticket.usage.recalled == (count != 4)  # seen once, by the first
    session = Session(model, Settings(max_new_tokens=6), vision_tokens=9)
    session.show_image(picture)
    told = session.answer_alone(QUESTION).text
    assert told == model.generate(QUESTION, picture, max_new_tokens=6, vision_tokens=9)


def test_a_film_keeps_only_the_tokens_that_are_asked_for(model: Model) -> None:
    film = np.stack([tiny_model.picture(n) for n in range(5)])
    session = Session(model, Settings(max_new_tokens=6), chunk=2)
    session.show_video(film)
    for count, seen in ((4, 0), (4, 5), (16, 0), (0, 0)):
        told = session.answer_alone(QUESTION, vision_tokens=count).text
        expected = model.generate(QUESTION, videos=film, max_new_tokens=6, vision_tokens=count)
        assert told == expected, count
        assert session._ticket is not None and session._ticket.usage.recalled == seen
    width = model.bundle.model.llm.width
    # Of 30 tokens a frame, 4, 16 and none are kept, in float32.
    assert session.memory()["tokens"] == 5 * (4 + 16) * width * 4


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (5, "vision_tokens is 5, but this model has 0, 1, 4, 9, 16 for an image: give one of"),
        (-1, "vision_tokens is -1, but this model has 0, 1, 4, 9, 16"),
        (True, 'vision_tokens is True; give a number of tokens of an image, or "all"'),
        (4.0, "vision_tokens is 4.0; give a number"),
        ("auto", "vision_tokens is 'auto'; give a number of tokens of an image, or \"all\""),
    ],
)
def test_a_count_that_it_does_not_have_is_refused(model: Model, given: Any, sentence: str) -> None:
    picture = tiny_model.picture(0)
    with pytest.raises(InputError, match=sentence):
        model.generate(QUESTION, picture, vision_tokens=given)
    session = Session(model)
    session.show_image(picture)
    with pytest.raises(InputError, match=sentence):
        session.ask(QUESTION, vision_tokens=given)
    with pytest.raises(InputError, match=sentence):
        llava_mini_jax.load(tiny_model.folder("nested"), vision_tokens=given)


def test_as_many_counts_as_prompts(model: Model) -> None:
    with pytest.raises(InputError, match="vision_tokens holds 2 numbers for 3 prompts"):
        model.generate([QUESTION] * 3, vision_tokens=[1, 4])


def test_models_of_one_number_take_no_other() -> None:
    bundle = tiny_model.bundle("paper")
    assert vision_tokens.chosen(1, bundle) is vision_tokens.chosen("all", bundle) is None
    assert vision_tokens.with_unasked(bundle, 1) is bundle
    with pytest.raises(InputError, match="this model has 1 for an image and no other number"):
        vision_tokens.chosen(4, bundle)
    pruned = PruMergeConfig(layer=1, neighbours=5, ratio=0.0, variant="clean")
    kinds = {
        "gives each image as many tokens as it deserves": dict(compressor=pruned),
        "compresses inside the language model": dict(prefusion_layers=0, inside_layers=1),
    }
    for sentence, changes in kinds.items():
        cfg = tiny.model("paper", **changes)
        with pytest.raises(InputError, match=sentence):
            vision_tokens.chosen(4, dataclasses.replace(bundle, model=cfg))


def test_the_command_and_eval_take_a_count(model: Model, tmp_path, capsys) -> None:
    picture = tiny_model.write_picture(tmp_path / "a.png", 3)
    words = ["ask", str(tiny_model.folder("nested")), "--image", str(picture), QUESTION]
    assert cli.main([*words, "--max-new-tokens", "8", "--vision-tokens", "9"]) == 0
    expected = model.generate(QUESTION, picture, max_new_tokens=8, vision_tokens=9)
    assert capsys.readouterr().out.rstrip("\n") == expected.rstrip("\n")
    assert cli.main([*words, "--vision-tokens", "5"]) == 2
    assert "this model has 0, 1, 4, 9, 16" in capsys.readouterr().err
    assert cli.main([*words, "--vision-tokens", "many"]) == 2
    assert 'is neither a whole number nor "all"' in capsys.readouterr().err


@pytest.mark.parametrize("way", ["separate", "prefix"])
def test_a_slot_knows_tokens_of_different_counts_apart(way: str) -> None:
    """What stands in a slot is read again where another token belongs: marks are equal only for
    the same token of the same frame."""
    cfg = NestedConfig(way=way, width=32, counts=COUNTS, count=1)
    choice = nested.declare(cfg).choice
    assert choice is not None
    film = Seen(None, expected=2, first=100)  # of two frames
    text, fused = np.array([5, -1, 6]), np.array([True, False, True])
    marks = {n: mark_visual([film], text, fused, choice.taken(n)).tolist() for n in COUNTS}
    assert [len(marks[n]) for n in COUNTS] == [2 + 2 * n for n in COUNTS]
    four, nine = set(marks[4][1:-1]), set(marks[9][1:-1])
    assert len(four) == 8 and len(nine) == 18 and max(four | nine) < 0
    assert four <= nine if way == "prefix" else not four & nine
    if way == "prefix":  # frame by frame, and the first of each frame
        assert marks[9][1:5] == marks[4][1:5] and marks[9][10:14] == marks[4][5:9]
