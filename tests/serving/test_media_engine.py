"""Media of requests in the engine: what was sent before answers alike, what breaks ends alone."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llava_mini_jax
from llava_mini_jax import Model
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.engine import Engine
from llava_mini_jax.inference.lane import LaneSize
from llava_mini_jax.inference.request import Pictures
from llava_mini_jax.inference.ticket import Medium, Request
from llava_mini_jax.serving.errors import ApiError
from llava_mini_jax.serving.parts import ImagePart, VideoOptions, VideoPart
from tests import tiny, tiny_model
from tests.data.clips import make_video
from tests.inference.test_engine import Heard, run
from tests.serving.test_media import data, picture, reader, saved
from tests.serving.test_media_films import children
from tests.serving.test_media_films import sent as sent_frames

fast_compilation = tiny.fast_compilation


@pytest.fixture(scope="module")
def model() -> Model:
    return llava_mini_jax.load(tiny_model.folder("paper"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("clip") / "a.mp4", range(0, 120))


def request(model: Model, media: list[Medium], question: str, tenant: str) -> Request:
    frames = tuple(medium.frames for medium in media)
    pixels = np.zeros((sum(frames), 1, 16, 16, 3), np.uint8)
    example = model.request(question, Pictures(pixels, frames))
    return Request(replace(example, pixels=pixels[:0]), media, Settings(max_new_tokens=12), tenant)


def test_what_was_sent_before_answers_as_if_it_were_sent_again(model, clip):
    to, film = reader(model.bundle), data(clip.read_bytes(), "video/mp4")
    engine = Engine(model, [LaneSize(4, 256)])

    def answer(parts: list[Any], question: str, engine: Engine = engine) -> Heard:
        heard = Heard(engine, request(model, to.read(parts, VideoOptions(), "t"), question, "t"))
        run(engine)
        assert heard.error is None
        return heard

    sent = [ImagePart(data(saved(picture())), "auto", "p"), VideoPart(film, "f")]
    answer(sent, "which digit is it?")
    again = answer([ImagePart(None, "auto", "p"), VideoPart(None, "f")], "how many 7s are there?")
    assert again.ticket.usage.recalled == again.ticket.usage.frames == 13
    fresh = Engine(model, [LaneSize(4, 256)])
    assert again.ids == answer(sent, "how many 7s are there?", fresh).ids
    frames = sent_frames(*(saved(picture(seed)) for seed in range(12)))
    other = [ImagePart(data(saved(picture(1)))), VideoPart(frames)]
    assert again.ids != answer(other, "how many 7s are there?", fresh).ids


def test_a_film_that_breaks_ends_its_own_request_alone(model, clip):
    to = reader(model.bundle)
    (medium,) = to.read([VideoPart(data(clip.read_bytes()))], VideoOptions(num_frames=-1), "t")
    assert medium.frames > 100

    def broken() -> Iterator[np.ndarray]:
        for number, frame in enumerate(medium.read()):
            if number == 20:  # as where the process that decodes has crashed (test_media_films.py)
                raise ApiError(400, "video 1 cannot be read")
            yield frame

    engine = Engine(model, [LaneSize(4, 256)])
    first = Heard(engine, request(model, [replace(medium, read=broken)], "a?", "t"))
    images = to.read([ImagePart(data(saved(picture())))], VideoOptions(), "t")
    second = Heard(engine, request(model, images, "b?", "t"))
    run(engine, 100_000)
    assert isinstance(first.error, ApiError)
    assert first.error.status == 400
    assert second.done and not children()
