"""train.py's command line: config files, overrides, and one clear message for each mistake."""

import dataclasses
import re
import subprocess
import sys

import pytest

import train
from configs import digits
from llava_mini_jax.errors import LostError
from llava_mini_jax.training import loop
from llava_mini_jax.training.trackers import TrackConfig
from llava_mini_jax.training.xprof import ProfileConfig
from tests.conftest import ROOT

DIGITS = str(ROOT / "configs" / "digits.py")


@pytest.fixture
def started(monkeypatch):
    """What `loop.run` is called with, in place of a training run."""
    calls = []
    monkeypatch.setattr(loop, "run", lambda *given: calls.append(given))
    return calls


def status_of(argv):
    """The exit status, whether main returns it or tyro's help leaves with it."""
    try:
        return train.main([str(word) for word in argv])
    except SystemExit as error:
        return error.code


def refused(capsys, argv):
    """The message of a command that is refused, which is one line."""
    assert status_of(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("train.py: ")
    return err


def test_the_stages_of_the_config_are_run_in_the_workdir(started, tmp_path):
    assert status_of([DIGITS, "--workdir", tmp_path]) == 0
    assert started == [
        (list(vars(digits.config()).values()), str(tmp_path), ProfileConfig(), False, TrackConfig())
    ]


def test_fields_are_replaced_on_the_command_line(started, tmp_path):
    options = ["--stage2.optimizer.learning-rate", "5e-5", "--stage2.trainable", "llm/*", "*/bias"]
    options += ["--captions.mesh.fsdp", "2", "--baseline.scan-layers"]
    assert status_of([DIGITS, "--workdir", tmp_path, *options]) == 0
    captions, baseline, stage1, stage2 = started[0][0]
    known = digits.config()
    optimizer = dataclasses.replace(known.stage2.optimizer, learning_rate=5e-5)
    trainable = ("llm/*", "*/bias")
    assert stage2 == dataclasses.replace(known.stage2, optimizer=optimizer, trainable=trainable)
    mesh = dataclasses.replace(known.captions.mesh, fsdp=2)
    assert captions == dataclasses.replace(known.captions, mesh=mesh)
    assert (stage1, baseline.scan_layers) == (known.stage1, True)


def test_a_config_of_one_stage(started, tmp_path):
    path = tmp_path / "one.py"
    path.write_text(
        "from configs import digits\n\ndef config():\n    return digits.config().stage1\n"
    )
    assert status_of([path, "--workdir", tmp_path, "--steps", "7"]) == 0
    stage = dataclasses.replace(digits.config().stage1, steps=7)
    assert started == [([stage], str(tmp_path), ProfileConfig(), False, TrackConfig())]


def test_trackers_are_named_on_the_command_line(started, capsys, tmp_path):
    options = ["--track.to", "wandb", "trackio", "--track.project", "pages"]
    assert status_of([DIGITS, "--workdir", tmp_path, *options]) == 0
    assert started[0][4] == TrackConfig(to=("wandb", "trackio"), project="pages")
    assert "mlflow" in refused(capsys, [DIGITS, "--workdir", tmp_path, "--track.to", "mlflow"])
    wrong = [DIGITS, "--workdir", tmp_path, "--track.project", ""]
    assert "give the project a name" in refused(capsys, wrong)


def test_data_that_is_lost_is_one_sentence_and_may_be_tried_again(monkeypatch, capsys, tmp_path):
    def lost(*_):
        raise LostError("one.tar has changed")

    monkeypatch.setattr(loop, "run", lost)
    assert status_of([DIGITS, "--workdir", tmp_path]) == 1
    assert capsys.readouterr().err == "train.py: one.tar has changed\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1\n", "defines no function `config()`"),
        ("def config():\n    return {'steps': 1}\n", "must return a TrainConfig, not dict"),
        (
            "from configs.digits import Digits\n\ndef config():\n    return Digits\n",
            "must return a TrainConfig, not type",
        ),
        (
            "from llava_mini_jax.sharding import MeshConfig as config\n",
            "MeshConfig has no TrainConfig among its fields",
        ),
    ],
)
def test_files_that_hold_no_config(capsys, started, tmp_path, content, message):
    path = tmp_path / "wrong.py"
    path.write_text(content)
    text = refused(capsys, [path, "--workdir", tmp_path])
    assert text.startswith("train.py: ") and message in text
    assert not started


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.py", "--workdir", "run"], "train.py: config file nowhere.py does not exist"),
        ([], "train.py: no config file is given; see: train.py --help"),
        (["--workdir", "run"], "train.py: no config file is given; see: train.py --help"),
        ([DIGITS], "train.py: a run needs --workdir DIR"),
        ([DIGITS, "--workdir"], "train.py: Missing value for argument '--workdir'"),
        (
            [DIGITS, "--workdir", "/" + 99 * "x", "--stage1.stepz", "3"],
            "train.py: Unrecognized options: --stage1.stepz, 3 (did you mean --stage1.steps?);",
        ),
        ([DIGITS, "--workdr", "/" + 99 * "x"], "options: --workdr, /" + 99 * "x"),
        ([DIGITS, "--workdir", "run", "--profile.steps", "5"], 'profile.steps is "5"; expected'),
        ([DIGITS, "--workdir", "run", "--profile.steps", "9:5"], 'profile.steps is "9:5"; expect'),
        ([DIGITS, "--workdir", "run", "--stage1.steps", "many"], "--stage1.steps: invalid literal"),
        ([DIGITS, "--workdir", "run", "--stage1.data.page-size", "5"], "page_size 5 leaves less"),
        ([DIGITS, "--workdir", "run", "--stage2.model.compressor.kind", "big"], '"big" is unknown'),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_mistakes_on_the_command_line(capsys, started, argv, message):
    assert message in refused(capsys, argv)
    assert not started


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stage1.trainable", "projektor/*"], 'stage1: the pattern "projektor/*" matches no'),
        (["--stage1.steps", "0"], "stage1: steps is 0; it must be 1 or more"),
        (["--captions.mesh.data", "64"], "mesh data=64 x fsdp=1 x tensor=1 needs 64 devices"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_stages_that_cannot_run(capsys, tmp_path, options, message):
    text = refused(capsys, [DIGITS, "--workdir", tmp_path / "run", *options])
    assert text.startswith("train.py: ") and message in text


def test_a_workdir_that_is_a_file(capsys, tmp_path):
    (tmp_path / "file").touch()
    text = refused(capsys, [DIGITS, "--workdir", tmp_path / "file"])
    assert text.startswith("train.py: workdir") and "cannot be made" in text


@pytest.mark.parametrize("argv", [["--help"], ["-h"]])
def test_without_a_config_the_usage_is_told(capsys, argv):
    assert status_of(argv) == 0
    assert "python train.py CONFIG.py --workdir DIR" in capsys.readouterr().out


def test_help_lists_the_fields_of_the_config(capsys):
    assert status_of([DIGITS, "--help"]) == 0
    out = capsys.readouterr().out
    for option in ("--workdir", "--dry-run", "--stage1.optimizer.warmup-ratio", "--captions.steps"):
        assert option in out
    for meaning in ("folder of the run", "steps between checkpoints", "share of the steps"):
        assert meaning in out


def test_ctrl_c_says_how_to_go_on(capsys, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "run", interrupted)
    assert status_of([DIGITS, "--workdir", tmp_path]) == 130
    assert "the same command continues" in capsys.readouterr().out


def test_a_dry_run_tells_what_would_be_trained_and_trains_nothing(capsys, started, tmp_path):
    assert status_of([DIGITS, "--dry-run"]) == 0
    out = capsys.readouterr().out
    for stage in vars(digits.config()).values():
        assert f"{stage.name}: " in out
        assert f"{stage.steps} steps of {stage.batch_size} examples" in out
    assert "1,000,000 samples, 1,200 steps x 64 = 0.0768 epochs" in out
    # Parameters of stage 1, worked out by hand: a projector of two layers, and nothing else.
    width = digits.WIDTH
    projector = 2 * (width * width + width)
    row = next(line for line in out.split("stage1: ")[1].splitlines() if "projector" in line)
    counts = [int(cell.replace(",", "")) for cell in row.split("│")[2:-1]]
    assert counts == [projector, projector, 16 * projector]  # 4 bytes each, four times
    assert not started


def test_a_dry_run_needs_no_data(capsys, started):
    assert status_of([ROOT / "configs" / "stage1_vicuna_7b.py", "--dry-run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "558,336 samples in all, epochs not known: the data itself cannot be opened" in out


def test_a_dry_run_counts_the_frames_that_it_is_asked_for(capsys, started, tmp_path):
    config = ROOT / "configs" / "stage2_llama_3_1_8b_video.py"
    peaks = []
    for words in ([], ["--dry-run-images", "64"]):
        assert status_of([config, "--dry-run", *words]) == 0
        out = capsys.readouterr().out
        peaks.append(float(re.search(r"at the peak \(.*\)\s+│\s+([\d.]+) GiB", out)[1]))
    assert peaks[1] > 1.2 * peaks[0] and "64 images or frames each" in " ".join(out.split())
    said = refused(capsys, [config, "--dry-run", "--dry-run-images", "4096"])
    assert "rows of stage2 have 2048 positions, room for 1 to 2048 images or frames" in said
    packed = ROOT / "configs" / "digits_packed.py"
    said = refused(capsys, [packed, "--dry-run", "--dry-run-images", "2"])
    assert "room for packing.images (9) images, so leave out --dry-run-images" in said
    said = refused(capsys, [config, "--workdir", tmp_path, "--dry-run-images", "64"])
    assert "--dry-run-images belongs to --dry-run" in said


def test_a_dry_run_checks_the_stages(capsys, tmp_path):
    argv = [DIGITS, "--workdir", tmp_path, "--dry-run", "--stage2.fresh", "nothing/*"]
    assert '"nothing/*" matches no parameter' in refused(capsys, argv)


def test_as_a_program():
    done = subprocess.run(
        [sys.executable, "train.py", "nowhere.py", "--workdir", "run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "nowhere.py does not exist" in done.stderr
