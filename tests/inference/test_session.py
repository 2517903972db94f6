"""Sessions: every answer is the one that the whole conversation, asked anew, would get."""

import contextlib
import dataclasses
import gc
import itertools
import random
import threading

import jax
import numpy as np
import pytest

import llava_mini_jax
from llava_mini_jax.cost.video_plan import plan
from llava_mini_jax.data.media.video import FrameSampling, read_video
from llava_mini_jax.data.text.conversation import Turn
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference import blocks, bounds, reading, seeing_programs, slots
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.lanes import Lanes
from llava_mini_jax.inference.model import Model
from llava_mini_jax.inference.request import ONE_A_SECOND
from llava_mini_jax.inference.session import Session
from llava_mini_jax.inference.shelf import Budget, Shelf
from llava_mini_jax.models.compressors.m3 import M3Config
from llava_mini_jax.sharding import make_mesh
from tests import tiny, tiny_model

fast_compilation = tiny.fast_compilation

SETTINGS = Settings(max_new_tokens=6)
WORDS = (
    "which digit is in row 1 column 2?",
    "how many 7s are there?",
    "read the page.",
    "largest?",
)
NOTHING = Budget(host=0)


@pytest.fixture(scope="module", params=["paper", "release", "llava-1.5"])
def model(request):
    return llava_mini_jax.load(tiny_model.folder(request.param))


@pytest.fixture(scope="module")
def paper():
    return llava_mini_jax.load(tiny_model.folder("paper"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_model.write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", seconds=11)


def said(session, question):
    return "".join(session.ask(question))


def held(session):
    """What stands in the session's slot, once its request has left it."""
    return session._engine._lanes.lanes[0].slots[0].marks


def text_of(session):
    """Positions of text in the last prompt."""
    usage = session._ticket.usage
    return usage.prompt - usage.image


def noted(monkeypatch, program, what):
    """`what` of the arguments of each call of one of reading.py's programs."""
    found, called = [], getattr(reading, program)
    monkeypatch.setattr(
        reading, program, lambda *given: found.append(what(*given)) or called(*given)
    )
    return found


def asked_anew(model, turns, question, images, videos):
    """The answer without any session: all of the conversation in one request."""
    history = [*turns, Turn("user", question), Turn("assistant", None)]
    return model.generate(history, images, videos, max_new_tokens=SETTINGS.max_new_tokens)


@pytest.mark.filterwarnings("ignore:the answer to the prompt ends early")  # it is compared too
def test_answers_are_those_of_the_conversation_asked_anew(model, clip):
    images = [tiny_model.picture(1), tiny_model.picture(2)]
    session = Session(model, SETTINGS, chunk=4)
    session.show_image(images[0])
    session.show_image(images[1])
    session.show_video(clip)
    questions = WORDS if model.bundle.model.prefusion_layers else WORDS[:1]  # 208 visual tokens
    for number, question in enumerate(questions):
        marks = "<image>\n" * 3 if number == 0 else ""
        expected = asked_anew(model, session.turns, marks + question, images, [clip])
        assert said(session, question) == expected, number
    assert session.frames == 13


def test_pictures_may_come_between_questions(paper):
    session = Session(paper, SETTINGS)
    assert said(session, WORDS[0]) == paper.generate(WORDS[0], max_new_tokens=6)
    for seed in (1, 2):
        session.show_image(tiny_model.picture(seed))
        images = [tiny_model.picture(s) for s in range(1, seed + 1)]
        expected = asked_anew(paper, session.turns, f"<image>\n{WORDS[seed]}", images, None)
        assert said(session, WORDS[seed]) == expected


@pytest.mark.parametrize("chunk", [1, 3, 8, 32])
def test_the_size_of_a_chunk_changes_no_answer(paper, clip, chunk):
    session = Session(paper, SETTINGS, chunk=chunk)
    session.show_video(clip)
    assert said(session, WORDS[1]) == paper.generate(WORDS[1], None, clip, max_new_tokens=6)


BUDGETS = {
    "device": Budget(device=2**30, host=0),
    "host": Budget(),
    "disk": Budget(host=0, disk=2**30),
    "features": Budget(best="features"),
    "pixels or source": NOTHING,
    "some of each": Budget(device=9_000, host=9_000, disk=5_000),
}


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_what_is_kept_changes_no_answer(paper, clip, budget):
    session = Session(paper, SETTINGS, budget=budget, chunk=2)
    session.show_image(tiny_model.picture(7))
    session.show_video(clip)
    for number, question in enumerate(WORDS[:3]):
        marks = "<image>\n" * 2 if number == 0 else ""
        images = [tiny_model.picture(7)]
        expected = asked_anew(paper, session.turns, marks + question, images, [clip])
        assert said(session, question) == expected
    used = session.memory()
    assert used["device"] <= budget.device and used["disk"] <= budget.disk
    pixels = 2 * np.prod(paper.read_pictures(tiny_model.picture(7), None).pixels.shape)
    assert used["host"] <= budget.host + pixels  # the image itself is always there


def test_a_budget_that_fills_up_keeps_less_of_what_comes_later(paper, clip):
    session = Session(paper, SETTINGS, budget=BUDGETS["some of each"], chunk=2)
    session.show_video(clip)
    said(session, WORDS[0])
    (seen,) = session._engine.gallery._known.values()
    tiers = [(kept.tier, kept.place) for kept in seen.kept]
    assert tiers == sorted(tiers, key=[*dict.fromkeys(tiers)].index) and len(set(tiers)) >= 4
    assert tiers[0] == ("memory", "device") and tiers[-1] == ("source", "")


def test_a_second_question_looks_at_no_frame_again(paper, clip, monkeypatch):
    session = Session(paper, SETTINGS)
    session.show_video(clip)
    said(session, WORDS[0])

    def refuse(*_):
        raise AssertionError("looked again")

    monkeypatch.setattr(seeing_programs, "encode_vision", refuse)
    monkeypatch.setattr(seeing_programs, "prefuse_images", refuse)
    before = len(held(session))
    positions = noted(monkeypatch, "read_block", lambda *given: int(given[4]))
    monkeypatch.setattr(reading, "read_fresh", refuse)
    said(session, WORDS[1])
    (new,) = positions  # the question and its frame of words: neither frames nor system prompt
    assert new < 40 < before < len(held(session))


def test_live_video(paper):
    """Frames that arrive between questions: as if they had all been there."""
    frames = np.stack([tiny_model.picture(seed) for seed in range(12)])
    session = Session(paper, SETTINGS, chunk=4)
    session.show_video(frames[:3])
    end = 3
    for number, question in enumerate(WORDS[:3]):
        marks = "<image>\n" if number == 0 else ""
        expected = asked_anew(paper, session.turns, marks + question, None, [frames[:end]])
        assert said(session, question) == expected
        session.append_frames(frames[end : end + 3])
        end += 3
    assert session.frames == 12


@pytest.mark.parametrize("budget", [NOTHING, Budget(best="pixels")], ids=["nothing", "pixels"])
def test_arrays_are_kept_as_the_pixels_that_the_model_reads(paper, budget):
    """Whatever becomes of them, and however large they were."""
    frames = np.stack([tiny_model.picture(seed) for seed in range(5)])
    expected = [paper.generate(question, None, frames, max_new_tokens=6) for question in WORDS[:2]]
    session = Session(paper, SETTINGS, budget=budget)
    session.show_video(frames)
    assert session.answer_alone(WORDS[0]).text == expected[0]
    pixels = paper.read_pictures(None, frames).pixels
    frames[:] = 0
    assert session.answer_alone(WORDS[1]).text == expected[1]
    used = session.memory()
    assert (used["host"], used["device"], used["disk"]) == (pixels.nbytes, 0, 0)


def test_frames_appended_to_a_file_that_is_read_again(paper, clip):
    """A budget of nothing: the file's frames are read again, the others have no file."""
    session = Session(paper, SETTINGS, budget=NOTHING, chunk=4)
    session.show_video(clip)
    said(session, WORDS[0])
    frames = [frame.copy() for frame in read_video(clip, ONE_A_SECOND)]
    session.append_frames([tiny_model.picture(40)] * 3)
    frames = np.stack([*frames, *[tiny_model.picture(40)] * 3])
    for question in WORDS[1:3]:
        expected = asked_anew(paper, session.turns, question, None, [frames])
        assert said(session, question) == expected


@pytest.mark.parametrize("patched", [{"FRESH": 16, "BLOCKS": (16,)}, {"FRESH": 16, "SCORES": 1}])
def test_long_prompts_are_read_in_blocks(paper, clip, monkeypatch, patched):
    whole = Session(paper, SETTINGS)
    whole.show_video(clip)
    expected = said(whole, WORDS[0])
    for name, value in patched.items():
        monkeypatch.setattr(blocks, name, value)
    first = noted(monkeypatch, "read_fresh", lambda *given: given[2][0].shape[0])
    sizes = noted(monkeypatch, "read_block", lambda *given: given[2].shape[0])
    session = Session(paper, SETTINGS)
    session.show_video(clip)
    assert said(session, WORDS[0]) == expected
    text = text_of(session)
    planned = plan(paper.bundle, 11, text, dtype="float32", chunk=8, answer=6, budget=Budget())
    assert first + sizes == [16] * planned.blocks and len(sizes) > 2


@pytest.mark.parametrize("dialect", [pytest.param("paper", marks=pytest.mark.slow), "release"])
def test_a_slot_that_grows_keeps_what_it_holds(dialect, monkeypatch):
    """A conversation that has outgrown its slot goes on in a longer one, and reads what is new."""
    model = llava_mini_jax.load(tiny_model.folder(dialect))
    monkeypatch.setattr(bounds, "slot_length", lambda prompt, answer, _: prompt + answer + 1)
    session = Session(model, SETTINGS)
    session.show_image(tiny_model.picture(1))
    lengths, usages, images = [], [], [tiny_model.picture(1)]
    for number, question in enumerate(WORDS):
        marks = "<image>\n" if number == 0 else ""
        expected = asked_anew(model, session.turns, marks + question, images, None)
        assert said(session, question) == expected
        lengths.append(session._engine._lanes.lanes[0].size.length)
        usages.append(session._ticket.usage)
    assert lengths == sorted(set(lengths))
    for before, usage in itertools.pairwise(usages):
        if dialect == "paper":
            assert usage.cached > before.prompt
        else:  # the last answer is fused now that it is history
            assert before.prompt - 5 < usage.cached <= before.prompt


def test_questions_that_stand_alone(model, clip):
    """Each is answered as if it were the only one, also behind a conversation."""
    session = Session(model, SETTINGS, chunk=4)
    session.show_image(tiny_model.picture(1))
    session.show_video(clip)
    said(session, WORDS[3])
    images, marks = [tiny_model.picture(1)], "<image>\n" * 2
    for question in (*WORDS, WORDS[0]):
        expected = model.generate(marks + question, images, [clip], max_new_tokens=6)
        assert session.answer_alone(question).text == expected
    said(session, WORDS[1])  # a conversation goes on behind the last of them
    history = [Turn("user", marks + WORDS[0]), Turn("assistant", session.turns[1].text)]
    assert session.turns[:2] == history


@pytest.mark.parametrize("asked", [False, True])
def test_who_drops_a_session_ends_the_thread_that_reads_ahead(paper, clip, asked):
    before = set(threading.enumerate())
    session = Session(paper, SETTINGS, chunk=2)
    session.show_video(clip)
    (reader,) = set(threading.enumerate()) - before
    if asked:
        said(session, WORDS[0])
    del session
    gc.collect()
    reader.join(10)
    assert not reader.is_alive()


@pytest.mark.slow
def test_weights_on_several_devices_give_the_same_answers(paper, clip):
    expected = [paper.generate(question, None, clip, max_new_tokens=6) for question in WORDS[:2]]
    with jax.set_mesh(make_mesh(tensor=2)):
        split = llava_mini_jax.load(tiny_model.folder("paper"))
        session = Session(split, SETTINGS, chunk=4)
        session.show_video(clip)
        assert [session.answer_alone(question).text for question in WORDS[:2]] == expected


@pytest.mark.slow
def test_a_hundred_random_sessions(paper, clip):
    """Images, videos, frames and questions in any order, kept in any way."""
    for seed in range(100):
        choice = random.Random(seed)
        budget = choice.choice(list(BUDGETS.values()))
        session = Session(paper, SETTINGS, budget=budget, chunk=choice.choice((1, 2, 8)))
        images, videos, live, waiting = [], [], None, 0
        for _ in range(choice.randint(2, 4)):
            for _ in range(choice.randint(0, 2)):
                # Images stand before videos in a request: so they are shown in that order.
                if not videos and choice.random() < 0.6:
                    images.append(tiny_model.picture(choice.randrange(50)))
                    session.show_image(images[-1])
                    waiting += 1
                elif live is not None and choice.random() < 0.5:
                    more = [tiny_model.picture(choice.randrange(50)) for _ in range(2)]
                    session.append_frames(more)
                    live = videos[-1] = np.concatenate([live, more])
                elif len(videos) < 2:
                    live = np.stack([tiny_model.picture(choice.randrange(50)) for _ in range(3)])
                    videos.append(live)
                    session.show_video(live)
                    waiting += 1
            question = choice.choice(WORDS)
            expected = asked_anew(
                paper, session.turns, "<image>\n" * waiting + question, images, videos
            )
            assert said(session, question) == expected, seed
            waiting = 0


def test_a_video_for_a_compressor_of_pictures(paper):
    m3 = dataclasses.replace(paper.bundle.model, compressor=M3Config(count=1), prefusion_layers=0)
    bundle = dataclasses.replace(paper.bundle, model=m3)
    session = Session(Model(paper.params, bundle, paper.tokenizer, paper.buckets))
    with pytest.raises(InputError, match='compressor "m3" is defined on images, and a video'):
        session.show_video(np.zeros((2, 8, 8, 3), np.uint8))


def test_what_does_not_fit_is_refused_before_anything_is_computed(paper, tmp_path):
    session = Session(paper, SETTINGS)
    long = tiny_model.write_video(tmp_path / "long.mp4", seconds=300, rate=1)
    with pytest.raises(InputError, match="300 images and frames take 300 positions, but the model"):
        session.show_video(long)
    session.show_video(long, FrameSampling(fps=1.0, max_frames=100))
    assert session.frames == 100
    with pytest.raises(InputError, match=r"the conversation needs \d+ positions"):
        said(session, "row " * 200)
    assert session.memory()["kv cache"] == 0
    assert said(session, "row?")


def test_mistakes(paper):
    with pytest.raises(InputError, match="no video to append to"):
        Session(paper).append_frames([tiny_model.picture(1)])
    session = Session(paper)
    session.show_image(tiny_model.picture(1))
    with pytest.raises(InputError, match="no video to append to"):
        session.append_frames([tiny_model.picture(2)])
    assert session.frames == 1
    with pytest.raises(InputError, match="1 times for 0 images or videos"):
        said(Session(paper), "what is <image> ?")
    with pytest.raises(InputError, match="chunk is 0"):
        Session(paper, chunk=0)
    with pytest.raises(InputError, match="a budget is -1 bytes of disk"):
        Budget(disk=-1)
    with pytest.raises(InputError, match="keeps 'all'"):
        Budget(best="all")


def test_an_abandoned_answer_spoils_nothing(paper):
    session = Session(paper, SETTINGS)
    session.show_image(tiny_model.picture(1))
    next(session.ask(WORDS[0]))  # and no more of it
    expected = paper.generate(WORDS[1], tiny_model.picture(1), max_new_tokens=6)
    assert said(session, WORDS[1]) == expected
    assert session.memory()["kv cache"] > 0


# ----------------------------------------------------------------------------- interruptions


def interrupting(function, call, error, after):
    """`function`, which raises `error` in, or right behind, one of its calls."""
    calls = iter(range(1, 1000))

    def interrupted(*given, **named):
        now = next(calls) == call
        if now and not after:
            raise error
        found = function(*given, **named)
        if now:
            jax.block_until_ready(found)
            raise error
        return found

    return interrupted


CUT_OFF = {
    # what is interrupted: in which of its calls, and whether its work was done
    "looking at frames": (seeing_programs, "encode_vision", 2, False),
    "frames that were looked at": (seeing_programs, "encode_vision", 2, True),
    "reading features": (seeing_programs, "prefuse_images", 2, True),
    "keeping frames": (Shelf, "put", 2, True),
    "fusing": (seeing_programs, "prefuse_text", 2, True),
    "text that is fused": (seeing_programs, "mean_text", 1, True),
    "making room in the cache": (slots, "empty", 1, True),
    "taking a slot": (Lanes, "_sit", 1, False),
    "a block of the prompt": (reading, "read_fresh", 1, True),
    "another block of the prompt": (reading, "read_block", 1, True),
    "decoding": (slots, "decode", 2, True),
    "an answer's tokens": (Lanes, "fetch", 3, True),
    "the end": (Lanes, "release", 1, False),
}


@pytest.mark.parametrize("name", CUT_OFF)
def test_a_question_that_is_cut_off_spoils_nothing(paper, clip, monkeypatch, name):
    """Ctrl-C anywhere: another question, and the same one again, have their answers."""
    monkeypatch.setattr(blocks, "FRESH", 16)  # several blocks
    whole, session = Session(paper, SETTINGS, chunk=4), Session(paper, SETTINGS, chunk=4)
    whole.show_video(clip)
    session.show_video(clip)
    home, function, call, after = CUT_OFF[name]
    for cut in (pytest.raises, contextlib.suppress):  # a follow-up has less that could be cut off
        with monkeypatch.context() as patch, cut(KeyboardInterrupt):
            original = getattr(home, function)
            patch.setattr(home, function, interrupting(original, call, KeyboardInterrupt, after))
            list(session.ask(WORDS[2], steps=1))
        for question in WORDS[:2]:
            assert session.answer_alone(question) == whole.answer_alone(question)


def test_a_full_disk_loses_no_frame(paper, clip, monkeypatch):
    budget = Budget(host=0, disk=2**30)
    whole, session = (Session(paper, SETTINGS, budget=budget, chunk=1) for _ in range(2))
    whole.show_video(clip)
    session.show_video(clip)
    full = interrupting(Shelf._write, 2, OSError(28, "No space left on device"), True)
    with monkeypatch.context() as patch:
        patch.setattr(Shelf, "_write", full)
        with pytest.raises(OSError, match="No space"):
            said(session, WORDS[0])
    assert session.memory()["disk"] == 0
    found = []
    fuse = seeing_programs.mean_text
    watched = lambda *given: found.append(fuse(*given)) or found[-1]  # noqa: E731
    monkeypatch.setattr(seeing_programs, "mean_text", watched)
    assert said(session, WORDS[0]) == said(whole, WORDS[0])
    np.testing.assert_array_equal(*found)
    assert session.memory()["disk"] == whole.memory()["disk"]


def test_an_answer_is_taken_to_its_end_or_not_at_all(paper):
    """What is asked, shown or forgotten in between ends an answer that is still open."""
    for go_on in (
        lambda session: said(session, WORDS[1]),
        lambda session: session.show_image(tiny_model.picture(2)),
        lambda session: session.new_conversation(),
    ):
        session = Session(paper, SETTINGS)
        session.show_image(tiny_model.picture(1))
        pieces = session.ask(WORDS[0], steps=1)
        next(pieces)
        go_on(session)
        turns = list(session.turns)
        with pytest.raises(InputError, match="the session moved on"):
            list(pieces)
        assert session.turns == turns
        images = [tiny_model.picture(seed) for seed in range(1, session.frames + 1)]
        expected = paper.generate(WORDS[2], images, max_new_tokens=6)
        assert session.answer_alone(WORDS[2]).text == expected


def test_a_question_is_refused_when_it_is_asked(paper):
    """As Model.stream does: not at the first piece, which may never be taken."""
    session = Session(paper, SETTINGS)
    session.show_image(tiny_model.picture(1))
    with pytest.raises(InputError, match="positions"):
        session.ask("a " * 2000)
    with pytest.raises(InputError, match="2 times for 1 images"):
        session.ask("<image> and <image>?")
    first = session.ask(WORDS[0])
    second = session.ask(WORDS[0])  # the first one is over before its first piece
    with pytest.raises(InputError, match="the session moved on"):
        next(first)
    expected = paper.generate(WORDS[0], [tiny_model.picture(1)], max_new_tokens=6)
    assert "".join(second) == expected


@pytest.mark.slow  # a second dialect
def test_text_alone_is_fused_with_a_blank_picture_where_the_model_wants_it(clip):
    release = llava_mini_jax.load(tiny_model.folder("release"))
    prompt = dataclasses.replace(release.bundle.prompt, blank_image=True)
    bundle = dataclasses.replace(release.bundle, prompt=prompt)
    blank = dataclasses.replace(release, bundle=bundle)
    session = Session(blank, SETTINGS)
    for question in WORDS[:2]:
        assert said(session, question) == asked_anew(
            blank, session.turns[:-2], question, None, None
        )
    assert session.turns[1].text != release.generate(WORDS[0], max_new_tokens=6)
    history = list(session.turns)
    session.show_video(clip)
    expected = asked_anew(blank, history, f"<image>\n{WORDS[2]}", None, [clip])
    assert said(session, WORDS[2]) == expected
