"""An option that is wrong, or changes nothing, is one line and status 2 in all three programs."""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import eval as eval_program
import train
from llava_mini_jax import arguments, cli
from llava_mini_jax.evaluation.run import options
from tests import tiny_model
from tests.conftest import ROOT

PROGRAMS = {"eval.py": eval_program.main, "train.py": train.main, "llava-mini": cli.main}
DIGITS = "configs/digits.py"


@pytest.fixture
def refused(capsys, monkeypatch):
    """What is said of words that a program refuses, the first of which names it."""
    monkeypatch.chdir(ROOT)

    def refused(*words: str) -> str:
        assert PROGRAMS[words[0]](list(words[1:])) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith(f"{words[0]}: "), err
        return err

    return refused


def parsers() -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Those of argparse, with the words that lead to them."""
    yield ("eval.py",), options.parser(None)
    yield ("llava-mini",), cli.top_parser()
    for command in cli.COMMANDS:
        for kind in cli.kinds_of(command) or [""]:
            words = ("llava-mini", command, *[kind] * bool(kind))
            yield words, cli.command_parser(command, kind)


def flags(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    named = {a.option_strings[-1]: a for a in parser._actions if a.option_strings}
    return {flag: action for flag, action in named.items() if flag != "--help"}


# The options of each kind of a command; it refuses those of its neighbours.
SHAPE = "--vision-tower --json --resolution --abstract --tokens --layers"
KEPT = "--compilation-cache"
MODEL = f"--out --no-plots --dtype --vision-tower {KEPT}"
KINDS = {
    "analyze attention": f"{MODEL} --data --images --limit --batch-size",
    "analyze compression": f"{MODEL} --image --video --queries --frames",
    "analyze drop": f"{MODEL} --benchmark --data --limit --width --batch-size",
    "analyze counts": "--out --dtype --vision-tower --benchmark --data --limit --batch-size"
    f" {KEPT}",
    "analyze needle": "",
    "data verify": "--images --workers --fps --max-frames --report --json",
    "data build": "--images --workers --fps --max-frames --out --shards --skip-rejected",
    "data speed": "--batches --threads --json",
    "data packing": "--images --stage --window --json",
    "plan video": "--frames --dtype --chunk --json",
    "plan training": "--json",
    "profile compressors": "--abstract --text --json --latency --dtype --llm-layers --repeats",
    "profile flops": f"{SHAPE} --text --xla",
    "profile latency": f"{SHAPE} --frames --text --new-tokens --dtype --repeats"
    f" --llm-layers --vision-layers --follow-up {KEPT}",
    "profile memory": f"{SHAPE} --frames --text --new-tokens --dtype --peak {KEPT}",
    "profile video": f"--video --frames --chunk --text --repeats --json {KEPT}",
    "profile requests": f"--dtype --requests --slots --new-tokens --repeats --abstract --llm-layers"
    f" --vision-layers --json {KEPT}",
    "profile compile": "--chip --slice --mesh --length --rows --images --layers --dtype --option"
    " --attention --json --report --text --stage --accumulate --fused --remat --program --slots"
    " --baseline",
}


def of_other_kinds() -> Iterator[tuple[str, str]]:
    for name, own in KINDS.items():
        near = [flags for other, flags in KINDS.items() if other.split()[0] == name.split()[0]]
        yield from ((name, flag) for flag in sorted(set(" ".join(near).split()) - {*own.split()}))


# The words of a mode, an option that changes nothing in it, its value, and how the mode is named.
IDLE = [
    ("llava-mini ask M hi", "--fps", "2", "without --video"),
    ("llava-mini ask M hi --image a.png", "--max-frames", "2", "without --video"),
    ("llava-mini ask M hi", "--top-p", "0.5", "at --temperature 0"),
    ("llava-mini ask M hi", "--top-k", "0", "at --temperature 0"),
    ("llava-mini ask M -i --temperature 0", "--seed", "0", "at --temperature 0"),
    ("llava-mini convert A B", "--dialect", "paper", "without --vision and --llm"),
    ("llava-mini convert A B", "--grid", "1", "without --vision and --llm"),
    ("llava-mini convert A B", "--prefusion-layers", "0", "without --vision and --llm"),
    ("llava-mini convert A B", "--prefusion-init", "copy", "without --vision and --llm"),
    ("llava-mini convert A B", "--seed", "0", "without --vision and --llm"),
    ("llava-mini convert --vision C --llm L B", "--vision-tower", "V", "with --vision"),
    (
        "llava-mini convert --vision C --llm L B --prefusion-layers 0",
        "--prefusion-init",
        "copy",
        "with --prefusion-layers 0",
    ),
    ("llava-mini inspect M", "--dialect", "paper", "without --abstract"),
    ("llava-mini inspect M", "--grid", "1", "without --abstract"),
    ("llava-mini inspect M", "--prefusion-layers", "0", "without --abstract"),
    ("llava-mini inspect --abstract vicuna-7b", "--vision-tower", "V", "with --abstract"),
    ("llava-mini benchmarks digits needle", "--data", "D", "with digits, needle"),
    (f"llava-mini data verify {DIGITS}", "--images", "D", "for a config"),
    (f"llava-mini data build {DIGITS} --out D", "--fps", "1", "for a config"),
    (f"llava-mini data verify {DIGITS}", "--max-frames", "1", "for a config"),
    ("llava-mini profile flops", "--vision-tower", "V", "without MODEL"),
    ("llava-mini profile latency --abstract vicuna-7b", "--vision-tower", "V", "without MODEL"),
    ("llava-mini profile memory --abstract vicuna-7b", "--vision-tower", "V", "without MODEL"),
    ("llava-mini profile memory --abstract vicuna-7b", "--text", "43", "without --peak"),
    ("llava-mini profile memory --abstract vicuna-7b", "--new-tokens", "9", "without --peak"),
    ("llava-mini profile memory M", "--dtype", "float32", "without --peak"),
    ("llava-mini profile memory M", "--compilation-cache", "none", "without --peak"),
    ("llava-mini analyze attention M", "--images", "D", "with --data digits"),
    ("llava-mini analyze compression M --image a.png", "--frames", "8", "without --video"),
    ("llava-mini analyze drop M", "--data", "D", "with --benchmark digits"),
    ("llava-mini analyze counts M", "--data", "D", "with --benchmark digits"),
    ("llava-mini reproduce table7", "--data", "D", "with --scale digits"),
    ("llava-mini reproduce table7 --dry-run", "--collect", None, "with --dry-run"),
    ("llava-mini reproduce table7 --collect", "--jobs", "2", "with --collect"),
    ("llava-mini reproduce table7 --scale full --collect", "--data", "D", "with --collect"),
    ("eval.py --model M", "--data", "D", "with --benchmarks digits"),
    ("eval.py --answers A", "--score-only", None, "with --answers"),
    *(
        (mode, flag, value, f"with {option}")
        for mode, option in (
            ("eval.py --model M --score-only", "--score-only"),
            ("eval.py --answers A", "--answers"),
        )
        for flag, value in {
            "--shard": "1/2",
            "--batch-size": "8",
            "--max-new-tokens": "9",
            "--dtype": "int8",
            "--vision-tower": "V",
            "--conv-mode": "brief",
            "--max-length": "99",
            "--compressor": "fastv",
            "--vision-tokens": "4",
            "--compilation-cache": "none",
        }.items()
    ),
    *(
        ("eval.py --model M --benchmarks pope", flag, value, "with --benchmarks pope")
        for flag, value in {
            "--judge-url": "http://h/v1",
            "--judge-model": "m",
            "--judge-key-variable": "K",
            "--judge-wording": "W",
            "--judge-concurrency": "8",
            "--judge-timeout": "120",
            "--judge-options": "{}",
            "--judge-fields": "{}",
        }.items()
    ),
    ("eval.py --model M --benchmarks mmvet", "--judge-key-variable", "", "without --judge-url"),
    ("eval.py --model M --benchmarks mmvet", "--judge-concurrency", "8", "without --judge-url"),
    ("eval.py --model M --benchmarks mmvet", "--judge-timeout", "9", "without --judge-url"),
]


@pytest.mark.parametrize(("mode", "flag", "value", "named"), IDLE)
def test_an_option_that_changes_nothing_is_refused(refused, mode, flag, value, named):
    said = refused(*mode.split(), flag, *[value] * (value is not None))
    assert said.startswith(f"{mode.split()[0]}: {flag} changes nothing {named}")


@pytest.mark.parametrize("mode", ["data verify {}", "analyze attention M --data {}"])
def test_a_built_folder_has_its_own_pictures(refused, tmp_path, mode):
    (tmp_path / "dataset_info.json").touch()
    said = refused("llava-mini", *mode.format(tmp_path).split(), "--images", str(tmp_path))
    assert "--images changes nothing for a built folder" in said


@pytest.mark.parametrize(("kind", "flag"), list(of_other_kinds()))
def test_an_option_of_another_kind_is_refused(refused, kind, flag):
    said = refused("llava-mini", *kind.split(), "M", flag, "1")
    assert f"unrecognized arguments: {flag}" in said
    assert said.endswith(f"; see: llava-mini {kind} --help\n")


def test_all_kinds_and_options_are_known():
    found = {" ".join(words[1:]): set(flags(parser)) for words, parser in parsers()}
    kinds = {f"{command} {kind}" for command in cli.COMMANDS for kind in cli.kinds_of(command)}
    assert {kind: found[kind] for kind in kinds} == {k: set(v.split()) for k, v in KINDS.items()}


def test_json_is_one_word_everywhere():
    """Programs need not know which command writes its document where: --json is stdout's."""
    found = {parser.prog: flags(parser).get("--json") for _, parser in parsers()}
    given = {prog: action for prog, action in found.items() if action is not None}
    assert len(given) > 10
    assert {(action.nargs, action.help) for action in given.values()} == {(0, arguments.JSON)}


def converted() -> Iterator[str]:
    for words, parser in parsers():
        for flag, action in flags(parser).items():
            if action.type not in (None, Path):
                yield " ".join([*words, flag])


@pytest.mark.parametrize("words", list(converted()))
@pytest.mark.parametrize("garbage", ["abc", "", "x" * 5000, "[" * 9999], ids=lambda text: text[:4])
def test_garbage_for_a_converter_is_one_sentence(refused, words, garbage):
    program, flag = words.rsplit(" ", 1)
    said = refused(*words.split(), garbage)
    given = f"{garbage[:40]!r}"[:-1]
    said = re.sub(r"argument -\w/--", "argument --", said)  # of those with a short name too
    assert said.startswith(f"{words.split()[0]}: argument {flag}: {given}")
    assert re.search(r" is (not an?|neither) ", said) and said.endswith(
        f"; see: {program} --help\n"
    )
    assert " _" not in said and len(said) < 400


@pytest.mark.parametrize(
    ("words", "said"),
    {
        "eval.py --modle M": "unrecognized arguments: --modle M; see: eval.py --help",
        "eval.py --limit": "argument --limit: expected one argument; see: eval.py --help",
        "eval.py": "give --model DIR",
        "eval.py --model M --benchmarks popes": '"popes"',
        "train.py": "no config file is given; see: train.py --help",
        f"train.py {DIGITS} --stage1.steps many": f"'many'; see: train.py {DIGITS} --help",
        "llava-mini ask": "arguments are required: MODEL; see: llava-mini ask --help",
        "llava-mini plan": "expected video, training after llava-mini plan, but nothing is given",
        "llava-mini profile --json flops": "after llava-mini profile, not '--json'; see:",
        "llava-mini analyze attention M --image a": "unrecognized arguments: --image a; see:",
    }.items(),
)
def test_all_programs_refuse_in_one_voice(refused, words, said):
    assert said in refused(*words.split())


# --- what used to be programs of their own --------------------------------------------------------


def test_plan_training(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(["plan", "training", "configs/stage1_vicuna_7b.py"]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("| stage | hardware |") and len(rows) == 6
    assert all(row.startswith("| stage1_vicuna_7b | ") for row in rows)


@pytest.mark.slow
def test_profile_video(capsys):
    words = ["--frames", "2", "--chunk", "2", "--text", "5", "--repeats", "1"]
    assert cli.main(["profile", "video", str(tiny_model.folder("release")), *words]) == 0
    out = capsys.readouterr().out
    assert "the model, both" in out and "times as fast as the release's loop" in out
    assert cli.main(["profile", "video", str(tiny_model.folder("release")), *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["frames"] == 2 and all(
        len(each) == 1 for each in found["seconds a frame"].values()
    )


def test_analyze_needle(capsys, tmp_path):
    details = {"parts": {"8 frames": 50.0}, "questions": {"8 frames": 4}}
    rules = {"exact": {"details": details}}
    found = {"benchmark": "needle", "model": "m", "headline": "exact", "rules": rules}
    (tmp_path / "results.json").write_text(json.dumps([found]))
    assert cli.main(["analyze", "needle", str(tmp_path)]) == 0
    names = [tmp_path / "needle.png", tmp_path / "needle.csv"]
    assert capsys.readouterr().out == "written: {} {}\n".format(*names)
    assert all(path.is_file() for path in names)


def test_the_package_is_the_command():
    words = [sys.executable, "-m", "llava_mini_jax", "data", "speed", "x.json", "--workers", "2"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("llava-mini: unrecognized arguments: --workers 2; see: ")
