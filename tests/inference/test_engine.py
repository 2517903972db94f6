"""The engine: what neighbours change (nothing), what is remembered, who waits for whom."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest

import llava_mini_jax
from llava_mini_jax import InputError, Model, compilation
from llava_mini_jax.data.text.conversation import Turn
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.engine import Engine, media_of
from llava_mini_jax.inference.lane import LaneSize
from llava_mini_jax.inference.session import Session
from llava_mini_jax.inference.shelf import Budget
from llava_mini_jax.inference.ticket import Medium, Piece, Request, Ticket
from tests import tiny, tiny_model
from tests.inference.steps import said

fast_compilation = tiny.fast_compilation

QUESTIONS = ("how many 7s are there?", "what is the largest digit?", "which digit is it?", "a b c")
LANES = [LaneSize(4, 128), LaneSize(2, 256)]


@pytest.fixture(scope="module")
def model() -> Model:
    return llava_mini_jax.load(tiny_model.folder("paper"))


@pytest.fixture(scope="module", params=["release", "llava-1.5"])
def other(request) -> Model:
    return llava_mini_jax.load(tiny_model.folder(request.param))


class Heard:
    """What one request was told."""

    def __init__(self, engine: Engine, request: Request):
        self.pieces: list[Piece] = []
        self.error: Exception | None = None
        self.ticket: Ticket = engine.submit(request, self.hear)

    def hear(self, news: Piece | Exception) -> None:
        assert self.error is None and not self.done, "told after its end"
        if isinstance(news, Exception):
            self.error = news
        else:
            self.pieces.append(news)

    @property
    def done(self) -> bool:
        return bool(self.pieces) and self.pieces[-1].answer is not None

    @property
    def text(self) -> str:
        assert self.done, self.error
        return "".join(piece.text for piece in self.pieces)

    @property
    def ids(self) -> list[int]:
        return [token for piece in self.pieces for token in piece.ids]


def asked(
    model: Model, question, picture: int | None = None, key: bytes = b"", tenant: str = "", **how
) -> Request:
    image = None if picture is None else tiny_model.picture(picture)
    example = model.request(question, model.read_pictures(image, None))
    media = tuple(dataclasses.replace(medium, key=key) for medium in media_of(example))
    return Request(example, media, Settings(**{"max_new_tokens": 12} | how), tenant)


def film(frames: int, key: bytes = b"") -> Medium:
    def read() -> Iterator[np.ndarray]:
        for frame in range(frames):
            yield np.full((1, 16, 16, 3), 20 * frame % 256, np.uint8)

    return Medium(key, frames, read)


def about(model: Model, question: str, medium: Medium, **how) -> Request:
    pixels = np.zeros((medium.frames, 1, 16, 16, 3), np.uint8)
    example = model.request(
        question, llava_mini_jax.inference.request.Pictures(pixels, (medium.frames,))
    )
    return Request(example, (medium,), Settings(**{"max_new_tokens": 12} | how))


def run(engine: Engine, most: int = 10_000) -> None:
    for _ in range(most):
        if not engine.step():
            return
    raise AssertionError("the engine does not come to an end")


def alone(model: Model, request: Request) -> list[int]:
    engine = Engine(model, LANES)
    heard = Heard(engine, request)
    run(engine)
    return heard.ids


MIXED: list[Callable[[Model], Request]] = [
    lambda m: asked(m, QUESTIONS[0], 1, max_new_tokens=30),
    lambda m: asked(m, QUESTIONS[1]),
    lambda m: asked(m, QUESTIONS[2], 2, temperature=1.2, top_p=0.9, seed=5),
    lambda m: asked(m, QUESTIONS[3] * 12, 3, max_new_tokens=3),
    lambda m: about(m, QUESTIONS[0], film(11)),
    lambda m: asked(m, QUESTIONS[1], 4, max_new_tokens=1),
    lambda m: asked(m, QUESTIONS[0], 1, temperature=0.7, top_k=9, seed=2**32 - 1),
    lambda m: asked(m, QUESTIONS[2] * 9, max_new_tokens=100),
]


@pytest.mark.parametrize(
    ("lanes", "ends"),
    [
        (LANES, 3),
        pytest.param(LANES, 1, marks=pytest.mark.slow),
        *(
            pytest.param([LaneSize(few, 128), LaneSize(long, 256)], ends, marks=pytest.mark.slow)
            for few, long in ((1, 1), (8, 2))
            for ends in (1, 3)
        ),
    ],
)
def test_tokens_do_not_depend_on_neighbours(model, lanes, ends) -> None:
    """In any order, in any number of slots, each token is the one that it is alone."""
    expected = [alone(model, make(model)) for make in MIXED]
    assert len({tuple(ids) for ids in expected}) > 5
    random = np.random.default_rng(ends)
    engine = Engine(model, lanes, ends=ends, steps=int(random.integers(1, 9)))
    order = random.permutation(len(MIXED) * 2) % len(MIXED)
    heard = []
    for number in order:
        heard.append(Heard(engine, MIXED[number](model)))
        for _ in range(random.integers(0, 4)):
            engine.step()
    run(engine)
    assert [one.ids for one in heard] == [expected[number] for number in order]
    assert engine.running == engine.waiting == 0


@pytest.mark.slow
def test_tokens_of_bfloat16_do_not_either() -> None:
    """On a CPU; what another device does with few bits is its own."""
    model = llava_mini_jax.load(tiny_model.folder("paper"), dtype="bfloat16")
    expected = [alone(model, make(model)) for make in MIXED[:6]]
    engine = Engine(model, LANES)
    heard = [Heard(engine, make(model)) for make in MIXED[:6] * 2]
    run(engine)
    assert [one.ids for one in heard] == expected * 2


def test_logprobs_do_not_depend_on_neighbours_bit_for_bit(model) -> None:
    request = asked(model, QUESTIONS[0], 1, logprobs=5, max_new_tokens=20)
    engine = Engine(model, LANES)
    first = Heard(engine, request)
    run(engine)
    engine = Engine(model, LANES)
    others = [Heard(engine, make(model)) for make in MIXED]
    second = Heard(engine, request)
    run(engine)
    assert all(one.done for one in others)
    tokens = [[token for piece in one.pieces for token in piece.tokens] for one in (first, second)]
    assert tokens[0] == tokens[1] and len(tokens[0]) == 20
    for token in tokens[0]:
        assert len(token.top) == 5 and token.top[0] == (token.id, token.logprob), "greedy"
        assert sum(np.exp(logprob) for _, logprob in token.top) <= 1 + 1e-5


def test_answers_are_those_of_a_session(model) -> None:
    session = Session(model, Settings(max_new_tokens=20))
    session.show_image(tiny_model.picture(1))
    for question in QUESTIONS[:3]:
        expected = session.answer_alone(question).text
        engine = Engine(model, LANES)
        heard = Heard(engine, asked(model, question, 1, max_new_tokens=20))
        run(engine)
        assert heard.text == expected


def test_other_models_answer_alike(other) -> None:
    """Compressed tokens in pre-fusion and blank images; no pre-fusion and patches as tokens."""
    for picture in (1, None):
        settings = Settings(max_new_tokens=8)
        session = Session(other, settings)
        if picture is not None:
            session.show_image(tiny_model.picture(picture))
        expected = session.answer_alone(QUESTIONS[0]).text
        request = asked(other, QUESTIONS[0], picture)
        assert said(other, [request.example] * 3, settings, slots=2).answers[2].text == expected


# --- What is remembered ---------------------------------------------------------------------------


def follow_up(model: Model, answer: str, picture: int, key: bytes, tenant: str = "") -> Request:
    turns = [Turn("user", f"<image>\n{QUESTIONS[0]}"), Turn("assistant", answer)]
    return asked(model, [*turns, Turn("user", QUESTIONS[1])], picture, key, tenant)


@pytest.mark.parametrize("budget", [Budget(), Budget(host=0), Budget(host=40_000)])
def test_a_follow_up_reads_only_what_is_new(model, budget) -> None:
    engine = Engine(model, LANES, budget=budget)
    first = Heard(engine, asked(model, QUESTIONS[0], 1, b"one"))
    run(engine)
    second = Heard(engine, follow_up(model, first.text, 1, b"one"))
    run(engine)
    assert second.ids == alone(model, follow_up(model, first.text, 1, b""))
    usage = second.ticket.usage
    assert usage.recalled == 1 and usage.prompt - usage.cached < 30 < usage.cached
    other = Heard(engine, follow_up(model, first.text, 2, b"two"))
    run(engine)
    assert other.ids == alone(model, follow_up(model, first.text, 2, b""))
    assert (other.ticket.usage.cached, other.ticket.usage.recalled) == (0, 0)


def test_nothing_is_shared_between_tenants(model) -> None:
    engine = Engine(model, LANES)
    request = asked(model, QUESTIONS[0], 1, b"one", "a")
    for tenant, known in (("a", 0), ("b", 0), ("a", 1), ("b", 1), ("", 0)):
        heard = Heard(engine, dataclasses.replace(request, tenant=tenant))
        run(engine)
        usage = heard.ticket.usage
        assert (usage.recalled, usage.cached > 0) == (known, bool(known)), tenant


def test_what_is_not_used_goes_when_the_budget_is_full(model) -> None:
    engine = Engine(model, LANES, budget=Budget(host=12_000))
    for number in range(12):
        Heard(engine, asked(model, QUESTIONS[0], number, b"%d" % number))
        run(engine)
        used = engine.gallery.used()
        assert sum(used.values()) - used["media"] <= 12_000
    assert 1 < engine.gallery.used()["media"] < 12
    again = Heard(engine, asked(model, QUESTIONS[1], 11, b"11"))
    gone = Heard(engine, asked(model, QUESTIONS[1], 0, b"0"))
    run(engine)
    assert (again.ticket.usage.recalled, gone.ticket.usage.recalled) == (1, 0)
    assert gone.ids == alone(model, asked(model, QUESTIONS[1], 0))


def test_one_picture_of_several_requests_is_looked_at_once(model, monkeypatch) -> None:
    looks: list[int] = []
    from llava_mini_jax.inference import seeing_programs

    encode = seeing_programs.encode_vision

    def watched(params, pixels, cfg):
        looks.append(len(pixels))
        return encode(params, pixels, cfg)

    monkeypatch.setattr(seeing_programs, "encode_vision", watched)
    engine = Engine(model, LANES)
    heard = [Heard(engine, asked(model, question, 1, b"one")) for question in QUESTIONS]
    run(engine)
    assert looks == [1]
    assert [one.ids for one in heard] == [alone(model, asked(model, q, 1)) for q in QUESTIONS]


def test_films_are_known_too_and_two_may_watch_one(model) -> None:
    engine = Engine(model, LANES)
    heard = [Heard(engine, about(model, q, film(13, b"film"))) for q in QUESTIONS[:2]]
    run(engine)
    later = Heard(engine, about(model, QUESTIONS[2], film(13, b"film")))
    run(engine)
    assert later.ticket.usage.recalled == 13
    for one, question in zip([*heard, later], QUESTIONS, strict=False):
        assert one.ids == alone(model, about(model, question, film(13)))


# --- Lanes ----------------------------------------------------------------------------------------


def test_a_row_that_outgrows_its_lane_goes_on_in_a_longer_one(model) -> None:
    request = asked(model, QUESTIONS[0], 1, max_new_tokens=120, ignore_end=True, logprobs=0)
    whole = Engine(model, [LaneSize(2, 256)])
    expected = Heard(whole, request)
    run(whole)
    assert len(expected.ids) == 120
    for shorter in (LaneSize(2, 96), LaneSize(1, 64)):
        engine = Engine(model, [shorter, LaneSize(1, 256)])
        engine._lanes.lane_of = lambda work, lanes=engine._lanes: lanes.lanes[0]  # type: ignore
        heard = [Heard(engine, request) for _ in range(3)]
        run(engine)
        assert [one.ids for one in heard] == [expected.ids] * 3
        assert all(len(one.pieces) > 1 for one in heard)


@pytest.mark.slow  # many shapes of a block
def test_long_prompts_are_read_in_blocks(model, monkeypatch) -> None:
    from llava_mini_jax.inference import blocks

    request = asked(model, " ".join(QUESTIONS) * 3, 1)
    expected = alone(model, request)
    monkeypatch.setattr(blocks, "FRESH", 32)
    assert alone(model, request) == expected
    # In slots that are hardly longer, a block begins in what is read already.
    needed = len(request.example.ids) + request.settings.max_new_tokens
    for length in (needed, needed + 5, needed + 31):
        engine = Engine(model, [LaneSize(2, length)])
        heard = [Heard(engine, request) for _ in range(2)]
        run(engine)
        assert [one.ids for one in heard] == [expected] * 2


def test_times_follow_each_other(model) -> None:
    engine = Engine(model, LANES)
    for request in (asked(model, QUESTIONS[0]), asked(model, QUESTIONS[0], 1)):
        heard = Heard(engine, request)
        run(engine)
        usage = heard.ticket.usage
        assert usage.begun and usage.first and usage.last
        assert usage.arrived < usage.begun < usage.first < usage.last
        assert (usage.vision > 0) == (usage.fusion > 0) == bool(request.media)


def test_an_answer_ends_where_the_longest_slot_does(model) -> None:
    engine = Engine(model, [LaneSize(1, 64)])
    heard = Heard(engine, asked(model, QUESTIONS[0], 1, max_new_tokens=100, ignore_end=True))
    run(engine)
    answer = heard.pieces[-1].answer
    assert answer is not None and answer.finish == "context"
    assert heard.ticket.usage.prompt + answer.tokens == 64
    with pytest.raises(InputError, match="the engine's longest slot has 63"):
        engine.submit(asked(model, QUESTIONS[0] * 12), lambda _: None)
    for lanes in ([], [LaneSize(0, 64)], [LaneSize(2, 1)]):
        with pytest.raises(InputError, match="slots"):
            Engine(model, lanes)


def test_a_new_request_enters_while_others_are_answered(model) -> None:
    engine = Engine(model, [LaneSize(2, 256)], steps=2)
    long = Heard(engine, asked(model, QUESTIONS[0], max_new_tokens=120, ignore_end=True))
    for _ in range(20):
        engine.step()
    short = [Heard(engine, asked(model, q, 1, max_new_tokens=3)) for q in QUESTIONS]
    while not all(one.done for one in short):
        engine.step()
    assert not long.done and len(long.ids) < 110
    run(engine)
    assert len(long.ids) == 120


def test_a_film_s_tokens_come_to_the_host_while_it_is_seen(model) -> None:
    """Thousands of chunks at once would be a gap for everybody when it gets its slot."""
    engine = Engine(model, [LaneSize(2, 256)])
    heard = Heard(engine, about(model, "What?", film(20, b"long")))
    most = 0
    while engine.step():
        for seen in engine.gallery._known.values():
            most = max(most, sum(isinstance(chunk, tuple) for chunk in seen.tokens))
    assert heard.ids and most == 1


def test_a_film_delays_others_by_one_chunk_at_a_time(model) -> None:
    engine = Engine(model, LANES, steps=1)
    chat = Heard(engine, asked(model, QUESTIONS[0], max_new_tokens=60, ignore_end=True))
    while not chat.pieces:
        engine.step()
    watched = Heard(engine, about(model, QUESTIONS[0], film(80), max_new_tokens=4))
    looked: list[int] = []
    while not chat.done:
        before = len(chat.ids)
        engine.step()
        looked.append(len(chat.ids) - before)
    assert looked.count(0) <= 3, "every step has a token for the chat"
    run(engine)
    assert watched.ids == alone(model, about(model, QUESTIONS[0], film(80), max_new_tokens=4))


# --- Ends -----------------------------------------------------------------------------------------


def test_settings_of_a_row(model) -> None:
    ids = alone(model, asked(model, QUESTIONS[0], 1, max_new_tokens=20, ignore_end=True))
    stop = ids[6]
    first = ids.index(stop)
    engine = Engine(model, LANES)
    plain = Heard(engine, asked(model, QUESTIONS[0], 1, max_new_tokens=20, stop_ids=[stop]))
    run(engine)
    assert plain.ids == ids[:first] and plain.pieces[-1].answer.finish == "stop"  # type: ignore
    later = Heard(
        engine,
        asked(model, QUESTIONS[0], 1, max_new_tokens=20, stop_ids=[stop], min_tokens=first + 2),
    )
    run(engine)
    assert len(later.ids) >= first + 2 and stop not in later.ids[: first + 2]
    assert later.ids[:first] == ids[:first]


def test_a_text_of_a_row_ends_it_and_frees_its_slot(model) -> None:
    whole = Engine(model, LANES)
    heard = Heard(whole, asked(model, QUESTIONS[0], 1, max_new_tokens=24))
    run(whole)
    words = heard.text.split()
    stop = f"{words[2]} {words[3]}"
    engine = Engine(model, [LaneSize(1, 128)], steps=8)
    cut = Heard(engine, asked(model, QUESTIONS[0], 1, max_new_tokens=24, stop=[stop]))
    after = Heard(engine, asked(model, QUESTIONS[1], 1))
    run(engine)
    assert cut.text == heard.text[: heard.text.index(stop)].strip()
    assert after.ids == alone(model, asked(model, QUESTIONS[1], 1))


@pytest.mark.parametrize("when", [0, 1, 2, 3, 6, 12])
def test_who_leaves_frees_everything(model, when) -> None:
    engine = Engine(model, [LaneSize(1, 128)], steps=1)
    gone = Heard(engine, asked(model, QUESTIONS[0], 1, b"one", max_new_tokens=60))
    film_gone = Heard(engine, about(model, QUESTIONS[0], film(40, b"film")))
    for _ in range(when):
        engine.step()
    count = len(gone.pieces)
    gone.ticket.cancel()
    film_gone.ticket.cancel()
    engine.step()
    engine.step()
    assert engine.running == engine.waiting == 0 and len(gone.pieces) == count
    assert all(not (seen.users or seen.owner) for seen in engine.gallery._known.values())
    after = Heard(engine, asked(model, QUESTIONS[1], 1, b"one"))
    run(engine)
    assert after.ids == alone(model, asked(model, QUESTIONS[1], 1))


def test_what_is_left_half_seen_is_seen_to_its_end_by_the_next_one(model) -> None:
    engine = Engine(model, LANES)
    gone = Heard(engine, about(model, QUESTIONS[0], film(40, b"film")))
    engine.step()
    engine.step()
    gone.ticket.cancel()
    later = Heard(engine, about(model, QUESTIONS[0], film(40, b"film")))
    run(engine)
    assert later.ids == alone(model, about(model, QUESTIONS[0], film(40)))
    assert later.ticket.usage.recalled in (8, 16)


@pytest.mark.parametrize("frames", [1, 13])
@pytest.mark.parametrize("budget", [Budget(), Budget(host=0)], ids=["kept", "read again"])
def test_a_film_that_is_longer_the_next_time(model, frames, budget) -> None:
    """Other text for the language model, as the mean is another; what was seen is known."""
    engine = Engine(model, [LaneSize(1, 128)], budget=budget)
    for count in (frames, frames + 5):
        heard = Heard(engine, about(model, QUESTIONS[0], film(count, b"film")))
        run(engine)
        assert heard.ids == alone(model, about(model, QUESTIONS[0], film(count)))
    assert (heard.ticket.usage.recalled, heard.ticket.usage.cached) == (frames, 0)


def test_a_film_of_which_a_part_in_the_middle_is_kept(model) -> None:
    """What is read again before and behind it are its own frames."""
    engine = Engine(model, LANES, budget=Budget(best="features"), chunk=4)
    Heard(engine, about(model, QUESTIONS[0], film(6, b"film")))
    run(engine)
    (seen,) = engine.gallery._known.values()
    room = sum(leaf.nbytes for leaf in jax.tree.leaves(seen.kept[1].arrays))
    engine = Engine(model, LANES, budget=Budget(host=room, best="features"), chunk=4)
    for count, question in ((6, QUESTIONS[0]), (8, QUESTIONS[1]), (8, QUESTIONS[2])):
        heard = Heard(engine, about(model, question, film(count, b"film")))
        run(engine)
        assert heard.ids == alone(model, about(model, question, film(count)))
    (seen,) = engine.gallery._known.values()
    assert [kept.tier for kept in seen.kept] == ["source", "features", "source"]


def test_what_failed_halfway_is_forgotten(model) -> None:
    engine = Engine(model, LANES)
    short = dataclasses.replace(film(20, b"film"), read=film(12).read)
    assert "of 20 frames" in str(error_of(engine, about(model, QUESTIONS[0], short)))
    used = engine.gallery.used()
    assert sum(used.values()) == 0, used


def error_of(engine: Engine, request: Request) -> Exception | None:
    heard = Heard(engine, request)
    run(engine)
    return heard.error


@pytest.mark.parametrize("best", ["memory", "features"])
def test_a_picture_that_is_known_is_not_looked_at_again(model, monkeypatch, best) -> None:
    from llava_mini_jax.inference import seeing_programs

    engine = Engine(model, LANES, budget=Budget(best=best))
    Heard(engine, asked(model, QUESTIONS[0], 1, b"one"))
    run(engine)
    monkeypatch.setattr(seeing_programs, "encode_vision", None)
    again = Heard(engine, asked(model, QUESTIONS[1], 1, b"one"))
    run(engine)
    monkeypatch.undo()
    assert again.ids == alone(model, asked(model, QUESTIONS[1], 1))


def test_what_cannot_be_read_ends_its_own_request_alone(model) -> None:
    def broken() -> Iterator[np.ndarray]:
        yield np.zeros((1, 16, 16, 3), np.uint8)
        raise InputError("the film ends in the middle")

    engine = Engine(model, LANES)
    fine = [Heard(engine, asked(model, q, 1)) for q in QUESTIONS[:2]]
    bad = Heard(engine, about(model, QUESTIONS[0], dataclasses.replace(film(9), read=broken)))
    short = Heard(
        engine, about(model, QUESTIONS[0], dataclasses.replace(film(9), read=film(5).read))
    )
    run(engine)
    assert str(bad.error) == "the film ends in the middle"
    assert "5 of 9 frames" in str(short.error)
    assert [one.ids for one in fine] == [alone(model, asked(model, q, 1)) for q in QUESTIONS[:2]]
    assert engine.running == engine.waiting == 0


def test_after_a_program_has_failed_the_engine_goes_on(model, monkeypatch) -> None:
    from llava_mini_jax.inference import slots

    engine = Engine(model, LANES)
    heard = [Heard(engine, asked(model, q, 1)) for q in QUESTIONS]
    with monkeypatch.context() as patched:

        def failing(*_: object) -> None:
            raise RuntimeError("out of memory")

        patched.setattr(slots, "decode", failing)
        with pytest.raises(RuntimeError) as caught:
            run(engine)
    engine.fail_all(caught.value)
    assert all(str(one.error) == "out of memory" for one in heard)
    again = Heard(engine, asked(model, QUESTIONS[0], 1))
    run(engine)
    assert again.ids == alone(model, asked(model, QUESTIONS[0], 1))


def test_nothing_is_compiled_for_other_settings(model) -> None:
    engine = Engine(model, LANES, steps=2)
    for make in MIXED:
        Heard(engine, make(model))
    run(engine)
    before = compilation.compiled()
    for how in (
        {"temperature": 0.3},
        {"seed": 8},
        {"stop": ["x"]},
        {"logprobs": 20},
        {"min_tokens": 2},
    ):
        Heard(engine, asked(model, QUESTIONS[2], 5, **how))
    run(engine)
    assert compilation.compiled() == before
