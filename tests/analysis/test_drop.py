"""Layers that do not see the image."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llava_mini_jax
from llava_mini_jax.analysis import attention, drop
from llava_mini_jax.analysis.drop import NOTHING, Blinded, Range
from llava_mini_jax.cli import main
from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.benchmark import all_names, find
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.models import llama, llava_mini
from tests import tiny, tiny_compressors, tiny_model

fast_compilation = tiny.fast_compilation

ATOL = 1e-5


@pytest.fixture(scope="module", params=["release", "llava-1.5"])
def model(request):
    return llava_mini_jax.load(tiny_model.folder(request.param))


def requests(model, *seeds):
    """The same questions about images of other seeds: rows of different lengths."""
    words = ["what", "which digit is in row 2 column 1 ?", "read the page"]
    return [
        model.request(word, model.read_pictures([tiny_model.picture(seed)], None))
        for word, seed in zip(words, seeds, strict=True)
    ]


def test_with_nothing_hidden_the_answers_are_the_models(model):
    settings = Settings(max_new_tokens=6)
    asked = requests(model, 0, 1, 2)
    plain = model.answer_requests(asked, settings, batch_size=4)
    blinded = Blinded(model.params, model.bundle, model.tokenizer, model.buckets, NOTHING)
    assert blinded.answer_requests(asked, settings, batch_size=4) == plain
    assert len({answer.text for answer in plain}) > 1


@pytest.mark.slow  # a model of its own
def test_with_nothing_hidden_holes_stay_holes():
    own, settings = tiny_compressors.model("prumerge"), Settings(max_new_tokens=6)
    asked = requests(own, 0, 1, 2)
    blinded = Blinded(own.params, own.bundle, own.tokenizer, own.buckets, NOTHING)
    plain = own.answer_requests(asked, settings, batch_size=4)
    assert blinded.answer_requests(asked, settings, batch_size=4) == plain


def test_models_whose_layers_do_more_are_refused():
    own = tiny_compressors.model("voco")
    with pytest.raises(InputError, match=r'in its LLM \(compressor "voco"\), whose layers this'):
        drop.scores(own, "", find("pope"), Path(), [], [NOTHING], Path(), batch_size=1)
    own = tiny_compressors.model("prumerge")
    with pytest.raises(InputError, match='"prumerge" gives images different numbers of tokens'):
        attention.by_layer(own.params, own.bundle, [], batch_size=1)


def test_blinded_everywhere_llava_1_5_answers_the_same_about_any_picture(model):
    settings = Settings(max_new_tokens=6)

    def answers(hidden: Range, *seeds: int) -> list[str]:
        own = Blinded(model.params, model.bundle, model.tokenizer, model.buckets, hidden)
        given = own.answer_requests(requests(model, *seeds), settings, batch_size=4)
        return [answer.text for answer in given]

    assert answers(NOTHING, 0, 1, 2) != answers(NOTHING, 3, 4, 5)
    blind = answers(Range(1, 1), 0, 1, 2) == answers(Range(1, 1), 3, 4, 5)
    # Pre-fusion reads the image all the same.
    assert blind == (model.bundle.model.prefusion_layers == 0)


@pytest.mark.parametrize("hidden", [(True, True), (True, False), (False, True)])
def test_text_is_blind_in_the_chosen_layers_alone_and_vision_never(hidden):
    cfg = tiny.model("llava-1.5")
    llm = llava_mini.unrolled(tiny.on_device(tiny.weights(cfg))).llm
    is_vision = np.array([[0, 0, 1, 1, 1, 0, 0, 0]], bool)
    noise = np.random.default_rng(0)
    x = noise.standard_normal((1, 8, 32)).astype(np.float32)
    other = np.where(is_vision[..., None], noise.standard_normal(x.shape), x).astype(np.float32)
    valid = np.ones((1, 8), bool)

    @jax.jit
    def run(x, hidden_L):
        return drop._blinded(llm, x, jnp.asarray(valid), jnp.asarray(is_vision), hidden_L, cfg)

    chosen = np.array(hidden)
    seen, blinded, changed = run(x, chosen & False), run(x, chosen), run(other, chosen)
    after = np.arange(8) > 4
    apart = np.abs(np.asarray(blinded) - np.asarray(changed))[0].max(axis=1)
    assert (apart[after].max() < ATOL) == all(hidden)
    assert apart[is_vision[0]].min() > 0.01
    # Vision tokens go on as if nothing were hidden, since no text behind them is seen.
    np.testing.assert_allclose(blinded[:, :5], seen[:, :5], atol=ATOL)
    assert np.abs(np.asarray(blinded - seen))[0, after].min(axis=1).max() > 0
    whole = llama.run_whole(llm.layers, jnp.asarray(x), jnp.asarray(valid), cfg.llm)
    np.testing.assert_allclose(seen, whole, atol=ATOL)


def test_ranges():
    assert drop.ranges(10, 4) == [NOTHING, (1, 4), (5, 8), (9, 10), (1, 10)]
    assert drop.ranges(2, 2) == [NOTHING, (1, 2)]
    with pytest.raises(InputError, match="give 1 to 2"):
        drop.ranges(2, 3)


def test_the_command(tmp_path, capsys):
    folder, out = str(tiny_model.folder("llava-1.5")), str(tmp_path / "out")
    words = ["analyze", "drop", folder, "--width", "1", "--out", out]
    assert main([*words, "--limit", "3"]) == 0
    assert "3 questions" in capsys.readouterr().out
    found = json.loads((tmp_path / "out/drop.json").read_text())
    assert list(found["scores"]) == ["none", "1-1"]
    answers = (tmp_path / "out/drop-digits/layers-1-1/answers.jsonl").read_text()
    assert len(answers.splitlines()) == 3
    assert (tmp_path / "out/drop.png").stat().st_size > 5000
    assert main([*words, "--limit", "4"]) == 2
    assert "made with other settings (prompts)" in capsys.readouterr().err


def test_another_model_in_the_same_folder_is_noticed(tmp_path, capsys):
    own, out = tmp_path / "model", str(tmp_path / "out")
    words = ["analyze", "drop", str(own), "--width", "1", "--limit", "2", "--no-plots"]
    shutil.copytree(tiny_model.folder("llava-1.5"), own)
    assert main([*words, "--out", out]) == 0
    shutil.rmtree(own)
    shutil.copytree(tiny_model.folder("release"), own)
    assert main([*words, "--out", out]) == 2
    assert "made with other settings (" in capsys.readouterr().err


def test_what_cannot_be_scored_or_seen_is_refused(model, tmp_path):
    digits = find("digits")
    questions = digits.questions(tmp_path)[:2]
    for change, said in (
        ({"gold": None}, "only a server knows"),
        ({"image": tmp_path / "none.png"}, "none of 2 images or videos exists"),
        ({"image": None, "video": tmp_path / "a.mp4"}, "asks about videos, which sessions answer"),
    ):
        changed = [dataclasses.replace(question, **change) for question in questions]
        with pytest.raises(InputError, match=said):
            drop.scores(model, "m", digits, tmp_path, changed, [NOTHING], tmp_path, batch_size=2)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    changed = [questions[0], dataclasses.replace(questions[1], image=broken)]
    with pytest.raises(InputError, match=r"1 of 2 questions cannot be asked, such as .*broken"):
        drop.scores(model, "m", digits, tmp_path, changed, [NOTHING], tmp_path, batch_size=2)


def test_benchmarks_with_a_judge_are_refused(model, tmp_path):
    judged = next(find(name) for name in all_names() if find(name).judge is not None)
    with pytest.raises(InputError, match="graded by another model"):
        drop.scores(model, "m", judged, tmp_path, [], [NOTHING], tmp_path, batch_size=1)
