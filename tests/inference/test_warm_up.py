"""What was compiled ahead is what is called: no program is compiled again."""

from collections import Counter
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest

from llava_mini_jax.inference import bounds, opening, warm_up
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.engine import Engine, media_of
from llava_mini_jax.inference.lane import LaneSize
from llava_mini_jax.inference.model import PROGRAMS, Model, read
from llava_mini_jax.inference.opening import Opened
from llava_mini_jax.inference.session import CHUNK, Session
from llava_mini_jax.inference.ticket import Request
from tests import tiny, tiny_compressors, tiny_model

fast_compilation = tiny.fast_compilation

NAMES = {f"jit({program.__name__})" for program in PROGRAMS}
SETTINGS = Settings(max_new_tokens=20)


@pytest.fixture
def compiled(monkeypatch) -> Iterator[Counter]:
    """How often each program of PROGRAMS has been compiled, from now on."""
    monkeypatch.setattr(warm_up, "threads_pay", lambda: True)
    counts: Counter = Counter()

    def heard(event: str, _: float, **about) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and about["fun_name"] in NAMES:
            counts[about["fun_name"]] += 1

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(heard)
    yield counts
    jax.monitoring.unregister_event_duration_listener(heard)


def opened(dialect: str, dtype: str | None = None) -> Opened:
    return opening.open_folder(
        tiny_model.folder(dialect), dtype=dtype, vision_tower=None, template=None, max_length=None
    )


def question(media: list[int], more: bool) -> Callable[[Model], str]:
    """A question about media of so many frames, as a session is asked it, and perhaps another."""

    def ask(model: Model) -> str:
        session = Session(model, SETTINGS)
        for number, frames in enumerate(media):
            pictures = [tiny_model.picture(number + n) for n in range(frames)]
            if frames == 1:
                session.show_image(pictures[0])
            else:
                session.show_video(np.stack(pictures))
        if more:  # of the same size: a longer text has another bucket
            session.answer_alone("how many 9s?")
            session.new_conversation()
        return "".join(session.ask("how many 7s are there?"))

    return ask


@pytest.mark.parametrize("dialect", ["paper", "release", "llava-1.5"])
@pytest.mark.parametrize(
    "media", [[], [1], [1, 1, 11]], ids=["text", "picture", "images and video"]
)
def test_a_question(compiled, dialect, media) -> None:
    if dialect == "llava-1.5" and len(media) > 1:
        media = [1, 2]  # longer ones do not fit
    check(compiled, opened(dialect), media)


def test_a_conversation(compiled) -> None:
    check(compiled, opened("paper"), [1], more=True)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_question_to_narrow_weights(compiled, dtype) -> None:
    check(compiled, opened("paper", dtype), [1])


def check(compiled: Counter, folder: Opened, media: list[int], more: bool = False) -> None:
    ask = question(media, more)
    from llava_mini_jax.inference import request

    turns = request.open_turns("how many 7s are there?", len(media), "the question")
    prompt = request.encode_turns(
        turns, len(media), folder.bundle, folder.tokenizer, "the question"
    )
    programs = warm_up.WarmUp(
        lambda call: warm_up.of_question(
            folder.with_shapes(),
            call,
            text=len(prompt.ids),
            media=media,
            answer=20,
            chunk=CHUNK,
            more=more,
        )
    )
    model = read(folder)
    programs.wait()
    before = dict(compiled)
    assert before["jit(decode)"] == 1
    assert ask(model)
    assert dict(compiled) == before


def test_a_batch_of_requests(compiled) -> None:
    model = read(opened("paper"))
    texts = ["how many 7s are there?", "what is the largest digit?", "which digit is it?", "hello"]
    shown = [*([tiny_model.picture(n)] for n in range(3)), None]
    requests = [
        model.request(text, model.read_pictures(pictures, None))
        for text, pictures in zip(texts, shown, strict=True)
    ]
    warm_up.WarmUp(
        lambda call: warm_up.of_requests(model, call, requests, SETTINGS, batch_size=3)
    ).wait()
    before = dict(compiled)
    assert before["jit(read_fresh)"] and before["jit(decode)"] == 1
    assert len(model.answer_requests(requests, SETTINGS, batch_size=3)) == 4
    assert dict(compiled) == before


@pytest.mark.slow  # a model each
@pytest.mark.parametrize(
    "name, changes, reads",
    [
        ("voco", {}, "jit(read_piece)"),
        ("prumerge", {}, "jit(read_fresh)"),
        ("fastv", dict(variant="drop"), "jit(read_chosen)"),
    ],
)
def test_a_batch_of_requests_to_other_methods(compiled, name, changes, reads) -> None:
    model = tiny_compressors.model(name, **changes)
    shown = [[tiny_model.picture(0)], None, [tiny_model.picture(1), tiny_model.picture(2)]]
    requests = [model.request("hello", model.read_pictures(given, None)) for given in shown]
    warm_up.WarmUp(
        lambda call: warm_up.of_requests(model, call, requests, SETTINGS, batch_size=2)
    ).wait()
    before = dict(compiled)
    assert before[reads] and before["jit(decode)"] == 1
    assert len(model.answer_requests(requests, SETTINGS, batch_size=2)) == 3
    assert dict(compiled) == before


@pytest.mark.slow  # a model, and all that a server compiles
def test_an_engine_whose_later_layers_choose(compiled) -> None:
    """Any text that its buckets hold, with an image and without."""
    model = tiny_compressors.model("fastv", variant="drop")
    sizes = [LaneSize(2, 96), LaneSize(1, 128)]
    texts = [size for size in model.buckets.lengths if size <= 64]
    warm_up.WarmUp(
        lambda call: warm_up.of_engine(model, call, sizes, texts=texts, steps=bounds.STEPS)
    ).wait()
    before = dict(compiled)
    assert before["jit(read_chosen)"] > 2
    engine = Engine(model, sizes)
    for words in (1, 10, 25):
        for shown in (None, [tiny_model.picture(words)]):
            example = model.request("digit " * words, model.read_pictures(shown, None))
            assert len(example.ids) <= texts[-1]
            engine.submit(Request(example, media_of(example), SETTINGS), lambda news: None)
    while engine.step():
        pass
    assert dict(compiled) == before


def test_what_fails_ahead_fails_when_it_is_called(compiled) -> None:
    def broken(call: Callable) -> None:
        call(jax.jit(lambda x: x), np.zeros(3))
        raise ValueError("not told here")

    warm_up.WarmUp(broken).wait()


def test_nothing_is_compiled_where_it_does_not_pay(compiled, monkeypatch) -> None:
    monkeypatch.setattr(warm_up, "threads_pay", lambda: False)
    warm_up.WarmUp(lambda call: pytest.fail("planned")).wait()


def test_who_waits_hears_how_far_it_is() -> None:
    def plan(call) -> None:
        for number in range(3):
            call(jax.jit(lambda x, number=number: x * number), np.float32(1))

    heard: list[tuple[int, int]] = []
    warm_up.WarmUp(plan, always=True).wait(lambda done, total: heard.append((done, total)))
    assert heard == [(1, 3), (2, 3), (3, 3)]
