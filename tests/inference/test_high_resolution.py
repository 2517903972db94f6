"""High resolution: k x k sub-images and the whole, in batches, in sessions and in plans.

The paper's LLaVA-Mini-HD has k = 2 (672 pixels, section 4.2).
"""

import dataclasses
import random

import jax
import numpy as np
import pytest

import llava_mini_jax
from llava_mini_jax import cli
from llava_mini_jax import config as configs
from llava_mini_jax.cost.video_plan import plan
from llava_mini_jax.data.digits.pages import build_tokenizer
from llava_mini_jax.inference import recompute
from llava_mini_jax.inference.answer import MOST_TOP, Settings
from llava_mini_jax.inference.lanes import Lanes
from llava_mini_jax.inference.model import Model
from llava_mini_jax.inference.session import Session
from llava_mini_jax.inference.shelf import Budget
from llava_mini_jax.weights.export_hf import export_model
from tests import tiny, tiny_model

fast_compilation = tiny.fast_compilation

TOKENS = 4
SETTINGS = Settings(max_new_tokens=TOKENS)
QUESTIONS = ("how many 7s are there?", "largest?")
FRAMES = 11
SIZES = [(30, 40), (48, 32), (90, 24), (32, 32), (15, 80)]  # height, width
# Float32 sums over frames and blocks in another order.
LOGITS_ATOL = 1e-4

CASES = [
    pytest.param(("paper", 2), id="paper-2"),
    pytest.param(("release", 3), id="release-3"),
    pytest.param(("paper", 3), id="paper-3", marks=pytest.mark.slow),
    pytest.param(("release", 2), id="release-2", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=CASES)
def folder(request, tmp_path_factory):
    """A model of `k` x `k` sub-images in a dialect, as a folder; k * k tokens an image."""
    dialect, k = request.param
    bundle = tiny_model.bundle(dialect)
    compressor = dataclasses.replace(bundle.model.compressor, grid=k)
    bundle = dataclasses.replace(
        bundle,
        model=dataclasses.replace(bundle.model, compressor=compressor),
        images=configs.image_config(dialect, bundle.model.vision, grid=k),
    )
    path = tmp_path_factory.mktemp("models") / f"{dialect}-{k}"
    export_model(tiny_model.weights(bundle), bundle, path, tokenizer=build_tokenizer())
    return path


@pytest.fixture(scope="module")
def model(folder) -> Model:
    return llava_mini_jax.load(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_model.write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", seconds=FRAMES)


def parts_of(model: Model) -> int:
    return model.bundle.images.grid**2 + 1


def picture(number: int) -> np.ndarray:
    height, width = SIZES[number % len(SIZES)]
    noise = np.random.default_rng(number)
    return noise.integers(0, 256, (height, width, 3), np.uint8)


def test_a_batch_of_pictures_of_different_sizes_is_its_rows_alone(model):
    assert model.bundle.images.parts == parts_of(model) in (5, 10)
    images = [[picture(n)] for n in range(5)] + [None, [picture(5), picture(6)]]
    prompts = [f"{'digit ' * (n % 3)}in row {n}?" for n in range(7)]
    together = model.generate(prompts, images, max_new_tokens=TOKENS, batch_size=7)
    alone = [
        model.generate(prompt, shown, max_new_tokens=TOKENS)
        for prompt, shown in zip(prompts, images, strict=True)
    ]
    assert together == alone and len(set(alone)) > 3


def test_every_part_of_a_picture_counts(model):
    """One sub-image changed: other logits."""
    k = model.bundle.images.grid
    side = 24 * k
    shown = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    before = logits_of_generate(model, QUESTIONS[0], shown, None)
    for number in random.Random(k).sample(range(k * k), 3):
        row, column = divmod(number, k)
        other = shown.copy()
        other[24 * row :, 24 * column :][:24, :24] = (
            255 - other[24 * row :, 24 * column :][:24, :24]
        )
        pixels = model.read_pictures([shown, other], None).pixels
        changed = [j for j in range(parts_of(model)) if (pixels[0, j] != pixels[1, j]).any()]
        assert changed == [number, k * k]  # and the whole
        # Only this part: the whole image is left as it was.
        pixels[1, k * k] = pixels[0, k * k]
        found = logits_of_pixels(model, QUESTIONS[0], pixels[1:])
        assert np.abs(found - before).max() > 10 * LOGITS_ATOL


def logits_of_pixels(model: Model, question: str, pixels: np.ndarray) -> np.ndarray:
    pictures = dataclasses.replace(
        model.read_pictures(picture(0), None), pixels=pixels, frames=(len(pixels),)
    )
    return logits_of(model, model.request(question, pictures))


def logits_of_generate(model: Model, question: str, images, videos) -> np.ndarray:
    return logits_of(model, model.request(question, model.read_pictures(images, videos)))


def logits_of(model: Model, example) -> np.ndarray:
    """Logits [V] behind the prompt, of the whole model without a cache."""
    logits = recompute.whole_model(model.params, model.bundle, model.buckets)
    return np.asarray(logits([example]))[0]


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_a_video_in_chunks_gives_the_logits_and_answers_of_generate(
    model, clip, chunk, monkeypatch
):
    found, tell = [], Lanes.tell

    def noted(lanes):
        found.extend(np.asarray(told.top_logprobs_BNJ)[0, 0] for _, _, told, _ in lanes._news)
        return tell(lanes)

    monkeypatch.setattr(Lanes, "tell", noted)
    monkeypatch.setattr(Settings, "refuse_for_engine", lambda *_: None)
    session = Session(model, dataclasses.replace(SETTINGS, logprobs=MOST_TOP), chunk=chunk)
    session.show_video(clip)
    for question in QUESTIONS:
        found.clear()
        answer = session.answer_alone(question)
        logits = logits_of_generate(model, question, None, clip)
        expected = np.sort(np.asarray(jax.nn.log_softmax(logits)))[::-1][:MOST_TOP]
        np.testing.assert_allclose(found[0], expected, atol=LOGITS_ATOL)
        assert answer.text == model.generate(question, None, clip, max_new_tokens=TOKENS)
    assert session.frames == FRAMES


def test_pictures_and_a_video_in_one_conversation(model, clip):
    session = Session(model, SETTINGS, chunk=4, budget=Budget(best="features"))
    session.show_image(picture(1))
    session.show_video(clip)
    marks = "<image>\n" * 2
    text = "".join(session.ask(QUESTIONS[0]))
    expected = model.generate(marks + QUESTIONS[0], picture(1), clip, max_new_tokens=TOKENS)
    assert text == expected


def test_what_is_planned_is_what_a_session_holds(model, clip):
    session = Session(model, SETTINGS, chunk=2)
    session.show_video(clip)
    answer = session.answer_alone(QUESTIONS[0])
    tokens = FRAMES * model.bundle.model.compressor.grid**2
    text = session._ticket.usage.prompt - tokens
    assert answer.tokens == TOKENS
    found = plan(
        model.bundle, FRAMES, text, dtype="float32", chunk=2, answer=TOKENS, budget=Budget()
    )
    held = session.memory()
    assert found.tokens == tokens
    assert held["kv cache"] == found.always["KV cache"] + 13  # a slot's token, counts and flag
    assert 2 * held["tokens"] == found.host["visual tokens"]
    assert held["host"] == found.host["frames kept"]
    pixels = model.read_pictures(None, clip).pixels
    assert pixels[:2].nbytes * 3 == found.host["frames read ahead"]


def test_a_dry_run_counts_the_tokens_of_every_part(folder, model, clip, capsys):
    assert cli.main(["ask", str(folder), "--video", str(clip), "--dry-run", QUESTIONS[0]]) == 0
    tokens = FRAMES * model.bundle.images.grid**2
    assert f"= {tokens} of {FRAMES} frames + " in capsys.readouterr().out.splitlines()[0]
