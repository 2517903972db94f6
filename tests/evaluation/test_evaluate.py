"""eval.py: asks once and keeps it, goes on after kills, is shared among machines, scores files."""

import dataclasses
import http.server
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

import eval as eval_program
from llava_mini_jax import cli
from llava_mini_jax.evaluation import benchmark as benchmarks
from llava_mini_jax.evaluation.benchmark import find
from llava_mini_jax.evaluation.run import evaluate, report
from llava_mini_jax.weights.export_hf import export_model
from tests import golden_data, tiny, tiny_model
from tests.conftest import ROOT
from tests.training.runs import SETTINGS

fast_compilation = tiny.fast_compilation

PAGE = 30
COUNT = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model whose images are as large as the digits world's pages."""
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


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small POPE: 20 questions a split, real files, images of noise."""
    folder = tmp_path_factory.mktemp("data") / "pope"
    (folder / "coco").mkdir(parents=True)
    (folder / "val2014").mkdir()
    noise, asked = np.random.default_rng(0), []
    for split, first in (("adversarial", 0), ("popular", 20_000_000), ("random", 10_000_000)):
        labels = []
        for number in range(1, COUNT // 3 + 1):
            name = f"COCO_{split}_{number}.png"
            pixels = noise.integers(0, 256, (24, 40, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "val2014" / name)
            text = f"Is there a {'large ' * (number % 4)}digit {number} in the image?"
            label = "yes" if number % 2 else "no"
            labels.append({"question_id": number, "image": name, "text": text, "label": label})
            line = {"question_id": first + number, "image": name, "category": split}
            text += "\nAnswer the question using a single word or phrase."
            asked.append({**line, "text": text})
        write_lines(folder / "coco" / f"coco_pope_{split}.json", labels)
    write_lines(folder / "llava_pope_test.jsonl", asked)
    return folder.parent


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def status_of(argv):
    try:
        return eval_program.main([str(word) for word in argv])
    except SystemExit as error:
        return error.code


def options(model, data, out, *more):
    common = ["--benchmarks", "pope", "--data", data, "--out", out, "--max-new-tokens", "4"]
    return ["--model", model, *common, *more]


def answers_in(out):
    (path,) = out.glob("*/pope/answers.jsonl")
    return path.read_bytes()


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    """The folder of an evaluation that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert status_of(options(model, data, out)) == 0
    return out


def test_answers_are_llavas_lines_in_the_order_of_the_questions(whole, data, capsys):
    lines = list(map(json.loads, answers_in(whole).splitlines()))
    questions = list(
        map(json.loads, (data / "pope/llava_pope_test.jsonl").read_text().splitlines())
    )
    assert [x["question_id"] for x in lines] == [x["question_id"] for x in questions]
    assert [x["prompt"] for x in lines] == [x["text"] for x in questions]
    assert len({x["answer_id"] for x in lines}) == COUNT
    assert all(x["metadata"]["cut"] in (True, False) for x in lines)


def test_what_an_evaluation_leaves(whole, model):
    (folder,) = whole.glob("*/pope")
    found = json.loads((folder / "results.json").read_text())
    assert (found["benchmark"], found["n"], found["answered"]) == ("pope", COUNT, COUNT)
    assert found["missing"] == found["unknown"] == found["repeated"] == []
    assert found["paper"]["LLaVA-Mini 7B"] == 84.4
    assert {"jax", "python", "transformers"} <= found["versions"].keys()
    assert found["settings"]["max_new_tokens"] == 4
    samples = list(map(json.loads, (folder / "samples.jsonl").read_text().splitlines()))
    assert len(samples) == COUNT
    assert {"key", "prompt", "text", "parsed", "gold", "scores", "cut_off"} == samples[0].keys()
    assert "| POPE |" in (whole / "results.md").read_text()
    assert json.loads((whole / "results.json").read_text())[0]["value"] == found["value"]


def test_a_second_run_asks_nothing(whole, model, data, capsys, monkeypatch):
    from llava_mini_jax.inference.model import Model

    def refuse(*_, **__):
        raise AssertionError("asked again")

    monkeypatch.setattr(Model, "answer_requests", refuse)
    before = answers_in(whole)
    assert status_of(options(model, data, whole)) == 0
    assert answers_in(whole) == before


def test_shards_together_are_the_whole(whole, model, data, tmp_path):
    for part in ("2/2", "1/2"):
        assert status_of(options(model, data, tmp_path, "--shard", part)) == 0
    parts = sorted(tmp_path.glob("*/pope/answers-*-of-2.jsonl"))
    lines = {line for path in parts for line in path.read_bytes().splitlines()}
    assert lines == set(answers_in(whole).splitlines())
    ours = json.loads((tmp_path / "results.json").read_text())[0]
    theirs = json.loads((whole / "results.json").read_text())[0]
    assert (ours["value"], ours["rules"]) == (theirs["value"], theirs["rules"])


def test_a_limited_run_asks_the_questions_it_says(model, data, tmp_path):
    assert status_of(options(model, data, tmp_path, "--limit", "7", "--offset", "10")) == 0
    ids = [json.loads(line)["question_id"] for line in answers_in(tmp_path).splitlines()]
    assert ids == [*range(11, 18)]
    assert json.loads((tmp_path / "results.json").read_text())[0]["n"] == 7


def test_answers_are_scored_without_a_model(whole, data, tmp_path, capsys):
    (path,) = whole.glob("*/pope/answers.jsonl")
    lines = list(map(json.loads, path.read_text().splitlines()))
    for line in lines:
        line["metadata"] = {}  # as LLaVA's own scripts write it
    theirs = tmp_path / "theirs.jsonl"
    write_lines(theirs, lines)
    argv = ["--benchmarks", "pope", "--data", data, "--out", tmp_path / "out"]
    assert status_of([*argv, "--answers", theirs]) == 0
    ours = json.loads((tmp_path / "out/results.json").read_text())[0]
    assert ours["value"] == json.loads((whole / "results.json").read_text())[0]["value"]

    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines[2:]))
    with (tmp_path / "odd.jsonl").open("a") as file:
        file.write(json.dumps({**lines[5], "text": "something else"}) + "\n")
        file.write(json.dumps({**lines[6], "question_id": 77_000_000}) + "\n")
    assert status_of([*argv, "--answers", tmp_path / "odd.jsonl"]) == 0
    odd = json.loads((tmp_path / "out/results.json").read_text())[0]
    assert (odd["n"], odd["answered"]) == (COUNT, COUNT - 2)  # the denominator stays
    assert odd["missing"] == ["1", "2"] and odd["unknown"] == ["77000000"]
    assert odd["repeated"] == [str(lines[5]["question_id"])]
    out = capsys.readouterr().out
    assert "2 questions have no answer (1, 2)" in out


def test_a_picture_that_cannot_be_read_is_told_and_asked_again(model, data, tmp_path, capsys):
    own = tmp_path / "data"
    shutil.copytree(data, own)
    broken = own / "pope/val2014/COCO_popular_3.png"
    kept = broken.read_bytes()
    broken.write_bytes(kept[:60])
    assert status_of(options(model, own, tmp_path / "out")) == 0
    found = json.loads((tmp_path / "out/results.json").read_text())[0]
    assert found["missing"] == ["20000003"] and list(found["unreadable"]) == ["20000003"]
    assert "20000003 was not asked: " in capsys.readouterr().out
    broken.write_bytes(kept)
    assert status_of(options(model, own, tmp_path / "out")) == 0
    found = json.loads((tmp_path / "out/results.json").read_text())[0]
    assert found["missing"] == [] and found["run"]["asked"] == 1


def test_other_settings_do_not_go_into_the_same_answers(whole, model, data, capsys):
    argv = options(model, data, whole)
    argv[argv.index("--max-new-tokens") + 1] = "5"
    assert status_of(argv) == 2
    assert "made with other settings (max_new_tokens): give another" in capsys.readouterr().err


# Writes an answer every few hundredths of a second, so that a kill finds some written.
SLOW = """
import sys, time, eval
from llava_mini_jax.evaluation.run import sheet

def slowly(*given, **named):
    time.sleep(0.04)
    return line_of(*given, **named)

line_of, sheet.line_of = sheet.line_of, slowly
sys.exit(eval.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_no_answer(whole, model, data, tmp_path):
    argv = list(map(str, options(model, data, tmp_path, "--batch-size", "1")))
    environment = os.environ | {name.upper(): str(jax.config.values[name]) for name in SETTINGS}

    def start():
        return subprocess.Popen(
            [sys.executable, "-c", SLOW, *argv], env=environment, cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    moments, lengths, kills = random.Random(0), set(), 0
    for _ in range(10):
        process = start()
        wanted = lines_in(tmp_path) + moments.randrange(1, 7)
        while process.poll() is None and lines_in(tmp_path) < wanted:
            time.sleep(0.01)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
        lengths.add(lines_in(tmp_path))
    assert start().wait() == 0
    assert kills >= 8 and len(lengths) >= 8
    assert answers_in(tmp_path) == answers_in(whole)


def lines_in(out):
    return sum(len(path.read_bytes().splitlines()) for path in out.glob("*/pope/answers.jsonl"))


def test_digits_stand_by_kind_beside_each_other(model, tmp_path, capsys):
    argv = ["--model", model, "--model", f"{model}/", "--out", tmp_path, "--limit", "8"]
    assert status_of(argv) == 0
    out = capsys.readouterr().out
    for kind in ("position", "row", "column", "largest"):
        assert kind in out
    assert (tmp_path / "page.png").is_file()
    with Image.open(tmp_path / "digits.png") as image:
        assert image.width > image.height > 100
    questions = find("digits").questions(tmp_path)
    assert len(questions) == 1000 and len({question.key for question in questions}) == 1000


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--benchmarks", "popeye"], 'benchmark "popeye" is unknown; known: digits'),
        (["--limit", "0"], "--limit is 0; give 1 or more"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0; give 1 or more"),
        (
            ["--benchmarks", "mmvet,msvd_qa", "--judge-options", '{"run": 5, "runs": 5}'],
            "has run, which no judge of these benchmarks has; they have mmvet: runs; msvd_qa: temp",
        ),
        (
            ["--benchmarks", "msvd_qa", "--judge-options", '{"runs": 5}'],
            "has runs, which no judge of these benchmarks has; ",
        ),
        (["--shard", "3/2"], "--shard is 3/2; give 1/N to N/N"),
        (["--shard", "half"], "--shard"),
        (
            ["--benchmarks", "pope", "--data", "nowhere"],
            "there is no nowhere/pope/llava_pope",
        ),
        (["--dtype", "float8"], 'dtype "float8" is unknown'),
        (["--paper", "GPT-5"], "--paper is GPT-5; give one of"),
        (["--offset", "5000"], "digits has 1000 questions; --offset 5000 leaves none"),
        (["--score-only"], "has no answers.jsonl; run without --score-only"),
        (["--benchmarks", "pope,digits", "--answers", "x"], "--answers is a file of one benchmark"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_refused(capsys, model, tmp_path, given, message):
    assert status_of(["--model", model, "--out", tmp_path / "out", *given]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_a_model_is_needed(capsys):
    assert status_of([]) == 2
    assert "give --model DIR" in capsys.readouterr().err


def test_all_benchmarks_are_listed_without_data(capsys):
    assert cli.main(["benchmarks"]) == 0
    out = capsys.readouterr().out
    assert all(f" {name} " in out for name in benchmarks.all_names())
    assert cli.main(["benchmarks", "pope", "--data", "nowhere"]) == 0
    assert "missing  pope/llava_pope_test.jsonl: LLaVA's eval.zip" in capsys.readouterr().out


class Grader(http.server.BaseHTTPRequestHandler):
    """A judge that finds every answer half right, and counts how often it is asked."""

    asked = 0

    def do_POST(self):
        Grader.asked += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        message = {"role": "assistant", "content": "0.5"}
        body = json.dumps({"model": "grader-1", "choices": [{"message": message}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_judged_benchmark_is_paid_for_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret-key")
    shutil.copytree(golden_data.OWN / "eval" / "mmvet", tmp_path / "data" / "mm-vet")
    answers = tmp_path / "data/mm-vet/answers/golden-model.jsonl"
    out = tmp_path / "out"
    argv = [
        "--benchmarks",
        "mmvet",
        "--data",
        tmp_path / "data",
        "--out",
        out,
        "--answers",
        answers,
    ]
    assert status_of(argv) == 0
    found = json.loads((out / "results.json").read_text())[0]
    assert found["value"] is None and "have no reply" in capsys.readouterr().out

    server = http.server.ThreadingHTTPServer(("localhost", 0), Grader)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://localhost:{server.server_address[1]}/v1"
    assert status_of([*argv, "--judge-url", url, "--judge-key-variable", "JUDGE_KEY"]) == 0
    server.shutdown()
    asked = Grader.asked
    found = json.loads((out / "results.json").read_text())[0]
    assert found["value"] == pytest.approx(50.0) and asked > 0
    assert "wording: ours" in capsys.readouterr().out
    assert status_of(argv) == 0  # by what was kept: no server is there any more
    again = json.loads((out / "results.json").read_text())[0]
    assert (again["value"], Grader.asked) == (found["value"], asked)
    for path in out.rglob("*"):
        assert not path.is_file() or b"sk-very-secret-key" not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        ("mvbench", "predictions.jsonl", "per_task_first_letter"),
        ("egoschema", "predictions.jsonl", None),
    ],
)
def test_the_releases_own_rows_are_answers_too(tmp_path, name, rows, expected):
    data = tmp_path / "data"
    shutil.copytree(golden_data.OWN / "eval" / name, data / name)
    argv = [
        "--benchmarks",
        name,
        "--data",
        data,
        "--out",
        tmp_path,
        "--answers",
        data / name / rows,
    ]
    assert status_of(argv) == 0
    found = json.loads((tmp_path / "results.json").read_text())[0]
    assert found["missing"] == found["unknown"] == [] and found["value"] > 0


def test_another_template_makes_other_prompts_and_is_another_setting(model, data, tmp_path, capsys):
    words = options(model, data, tmp_path, "--limit", "2")
    assert status_of([*words, "--conv-mode", "llama_3_1"]) == 0
    (path,) = tmp_path.glob("*/pope/settings.json")
    assert json.loads(path.read_text())["model"]["prompt"]["template"] == "llama_3_1"
    assert status_of(words) == 2
    assert "made with other settings (model)" in capsys.readouterr().err
    assert status_of([*words, "--conv-mode", "alpaca"]) == 2
    assert '"alpaca" is unknown; give one of' in capsys.readouterr().err


def test_averages_are_the_papers():
    """Table 1's row of LLaVA-Mini 7B, printed with 57.9."""
    row = (77.6, 60.9, 56.2, 70.4, 57.0, 84.4, 1466.0, 65.6, 58.5, 68.9, 36.6)
    found = report.averages(dict(zip(report.TABLE_1, row, strict=True)))
    assert found["paper average"] == pytest.approx(57.89390909090908)
    assert found["average"] == pytest.approx((sum(row) - 1466 + 73.3) / 11)
    assert report.averages({"pope": 1.0}) == {}


def test_a_bar_says_what_is_compiled_and_then_its_title_again():
    said = []
    for done in (3, 12):
        evaluate._say_compiling(lambda **change: said.append(change["description"]), "m", done, 12)
    assert said == ["m, compiling 3 of 12 programs", "m"]
