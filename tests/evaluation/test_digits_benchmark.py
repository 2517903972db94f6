"""The digits benchmark and eval.py: fixed held-out questions, exact scores, files, messages."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

import eval as eval_program
import llava_mini_jax
from llava_mini_jax.data.digits import DigitsConfig, DigitsPages
from llava_mini_jax.evaluation import digits
from llava_mini_jax.evaluation.digits import Question, Score
from llava_mini_jax.weights.export_hf import export_model
from tests import tiny, tiny_model

fast_compilation = tiny.fast_compilation

PAGE = 30


def question(kind, truth):
    return Question(kind, np.zeros((PAGE, PAGE, 3), np.uint8), f"{kind}?", truth)


# --- Questions and scores -------------------------------------------------------------------------


def test_questions_are_held_out_and_the_same_each_time():
    asked, again = digits.questions(PAGE, 30), digits.questions(PAGE, 30)
    assert [q.kind for q in asked] == [kind for kind in digits.KINDS for _ in range(30)]
    for ours, theirs in zip(asked, again, strict=True):
        np.testing.assert_array_equal(ours.image, theirs.image)
        assert (ours.text, ours.truth) == (theirs.text, theirs.truth)
    # The pages are those of the held-out split, in which no scan is one of the training split's.
    for number, kind in enumerate(digits.KINDS):
        config = DigitsConfig(
            page_size=PAGE, split="heldout", kinds=(kind,), seed=digits.SEED, augment=False
        )
        source = DigitsPages(config, 30)
        for index in range(30):
            np.testing.assert_array_equal(asked[30 * number + index].image, source[index]["image"])


def test_more_questions_begin_with_the_same_ones():
    few, many = digits.questions(PAGE, 3), digits.questions(PAGE, 5)
    for number in range(len(digits.KINDS)):
        for ours, theirs in zip(few[3 * number : 3 * number + 3], many[5 * number :], strict=False):
            assert (ours.text, ours.truth) == (theirs.text, theirs.truth)


def test_a_question_is_a_page_a_text_and_a_truth():
    for q in digits.questions(PAGE, 20):
        assert q.image.shape == (PAGE, PAGE, 3) and q.image.dtype == np.uint8
        assert "<image>" not in q.text and q.text.endswith(("?", "."))
        assert len(q.truth.split()) == (3 if q.kind in ("row", "column") else 1)


def test_an_answer_counts_if_its_words_are_exactly_the_truth():
    asked = [question("read", "1 2 3 4")] * 5 + [question("largest", "7")] * 3
    answers = ["1 2 3 4", " 1  2 3 4\n", "1 2 3", "1 2 3 4 5", "1234", "7", "77", ""]
    scores = digits.score(asked, answers)
    assert scores == {"read": Score(2, 5), "largest": Score(1, 3), "all": Score(3, 8)}
    assert scores["read"].accuracy == 0.4
    np.testing.assert_allclose(scores["read"].standard_error, (0.4 * 0.6 / 5) ** 0.5)


def test_every_question_needs_an_answer():
    with pytest.raises(ValueError):
        digits.score([question("read", "1")] * 2, ["1"])


def test_answers_stand_in_the_order_of_the_questions():
    class Echo:
        batches = ()

        def generate(self, prompts, images, *, max_new_tokens, batch_size):
            self.batches = (*self.batches, len(prompts))
            assert len(images) == len(prompts) <= batch_size
            assert max_new_tokens >= 2 * 4  # four digits and the spaces between them
            return [
                f"{text} {image[0, 0, 0]}" for text, (image,) in zip(prompts, images, strict=True)
            ]

    asked = [
        Question("read", np.full((PAGE, PAGE, 3), i, np.uint8), f"number {i}", "") for i in range(7)
    ]
    model = Echo()
    answers = digits.ask(model, asked, batch_size=3)
    assert answers == [f"number {i} {i}" for i in range(7)]
    assert model.batches == (3, 3, 1)


# --- eval.py --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose pages are large enough for four digits."""
    bundle = tiny_model.bundle("paper")
    vision = dataclasses.replace(bundle.model.vision, image_size=PAGE, patch_size=5)
    bundle = dataclasses.replace(
        bundle,
        model=dataclasses.replace(bundle.model, vision=vision),
        images=dataclasses.replace(bundle.images, size=PAGE),
    )
    path = tmp_path_factory.mktemp("models") / "tiny"
    export_model(tiny_model.weights(bundle), bundle, path, tokenizer=tiny_model.build_tokenizer())
    return path


def status_of(argv):
    try:
        return eval_program.main([str(word) for word in argv])
    except SystemExit as error:
        return error.code


def test_an_evaluation_leaves_scores_table_and_picture(capsys, folder, tmp_path):
    out = tmp_path / "results" / "digits"
    assert status_of(["--model", folder, "--limit", "2", "--out", out]) == 0
    (report,) = json.loads((out / "digits.json").read_text())
    assert (report["model"], report["vision_tokens"]) == (str(folder), 1)
    kinds = [*digits.KINDS, "all"]
    assert list(report["scores"]) == kinds
    asked = {kind: score["asked"] for kind, score in report["scores"].items()}
    assert asked == dict.fromkeys(digits.KINDS, 2) | {"all": 2 * len(digits.KINDS)}
    with Image.open(out / "digits.png") as picture:
        assert picture.format == "PNG" and picture.width > picture.height > 100
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in kinds) and str(out / "digits.json") in printed

    model = llava_mini_jax.load(folder)
    questions = digits.questions(PAGE, 2)
    scores = digits.score(questions, digits.ask(model, questions))
    assert report["scores"] == {
        kind: {"right": score.right, "asked": score.asked} for kind, score in scores.items()
    }


def test_models_stand_side_by_side_with_their_errors(capsys, folder, tmp_path, monkeypatch):
    right = iter([[True] * 4, [True, False]])  # the first model knows everything, the second half

    def ask(model, asked):
        pattern = next(right)
        return [q.truth if pattern[i % len(pattern)] else "?" for i, q in enumerate(asked)]

    monkeypatch.setattr(digits, "ask", ask)
    argv = ["--model", folder, "--model", folder, "--limit", "50", "--out", tmp_path]
    assert status_of(argv) == 0
    rows = capsys.readouterr().out.splitlines()
    row = next(
        line for line in rows if line.split("│")[1:2] and line.split("│")[1].strip() == "all"
    )
    count = 50 * len(digits.KINDS)
    error = 100 * (0.25 / count) ** 0.5
    assert [cell.strip() for cell in row.split("│")[2:4]] == ["100.0 ± 0.0", f"50.0 ± {error:.1f}"]
    first, second = json.loads((tmp_path / "digits.json").read_text())
    assert first["scores"]["all"] == {"right": count, "asked": count}
    assert second["scores"]["all"] == {"right": count // 2, "asked": count}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--benchmarks", "pope"], 'benchmark "pope" is unknown; known: digits'),
        (["--benchmarks", "digits,gqa"], '"gqa" is unknown'),
        (["--limit", "0"], "--limit is 0"),
        (["--limit", "many"], "--limit"),
        (["--dtype", "float8"], 'dtype "float8" is unknown'),
        (["--modle", "x"], "--modle"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_refused(capsys, folder, tmp_path, options, message):
    assert status_of(["--model", folder, "--out", tmp_path / "out", *options]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere/at/all", "nowhere/at/all does not exist"),
        ("empty", "config.json does not exist"),
    ],
)
def test_models_that_cannot_be_opened_are_named(capsys, tmp_path, monkeypatch, model, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert status_of(["--model", model]) == 2
    err = capsys.readouterr().err
    assert err.startswith("eval.py: ") and message in err


def test_a_model_whose_pictures_are_too_small_for_a_page_is_refused(capsys, tmp_path):
    assert status_of(["--model", tiny_model.folder("paper"), "--out", tmp_path]) == 2
    assert "page_size 16 leaves less than 10 pixels" in capsys.readouterr().err


def test_an_output_folder_that_is_a_file_is_refused(capsys, folder, tmp_path):
    (tmp_path / "file").touch()
    assert status_of(["--model", folder, "--out", tmp_path / "file"]) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_a_model_is_needed(capsys):
    assert status_of([]) == 2
    assert "--model" in capsys.readouterr().err
    assert status_of(["--help"]) == 0
