"""The `llava-mini` command from its arguments to what it prints, writes and returns."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import llava_mini_jax
from llava_mini_jax import Model, cli
from llava_mini_jax.cli import verify as verify_command
from llava_mini_jax.data.text.conversation import Turn
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference.answer import AnswerText
from llava_mini_jax.reproduce import verify as verify_module
from tests import tiny_model

QUESTION = "which digit is in row 1 column 2?"
SHORT = ["--max-new-tokens", "12"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model_folder() -> Path:
    return tiny_model.folder("paper")


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Model:
    return llava_mini_jax.load(model_folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    tiny_model.write_video(folder / "clip.mp4", seconds=3)
    for number, name in enumerate(("a.png", "b.png")):
        tiny_model.write_picture(folder / name, number)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """(exit status, stdout, stderr) of one command."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = cli.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def copied(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


# --- ask ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "videos"),
    [([], []), (["a.png"], []), (["a.png", "b.png"], []), ([], ["clip.mp4"])],
    ids=["text", "image", "two images", "video"],
)
def test_ask(
    run: Run, model: Model, model_folder: Path, files: Path, images: list, videos: list
) -> None:
    options = [word for image in images for word in ("--image", files / image)]
    options += [word for video in videos for word in ("--video", files / video)]
    status, out, err = run("ask", model_folder, *options, QUESTION, *SHORT)
    expected = model.generate(
        QUESTION, [files / i for i in images], [files / v for v in videos], max_new_tokens=12
    )
    assert (status, out, err) == (0, f"{expected}\n", "")


def test_ask_passes_its_settings_on(run: Run, model: Model, model_folder: Path) -> None:
    options = ["--temperature", 0.9, "--top-p", 0.9, "--top-k", 40, "--seed", 7]
    status, out, _ = run("ask", model_folder, QUESTION, *SHORT, *options, "--stop", "is")
    expected = model.generate(
        QUESTION, max_new_tokens=12, temperature=0.9, top_p=0.9, top_k=40, seed=7, stop=["is"]
    )
    assert (status, out) == (0, f"{expected}\n")


@pytest.mark.parametrize("given", [True, False], ids=["question given", "all piped"])
def test_ask_interactively(
    run: Run,
    model: Model,
    model_folder: Path,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: bool,
) -> None:
    questions = ["what is this?", "and the last digit?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*questions[given:], "", "unread"])))
    first = questions[:1] if given else []
    status, out, err = run("ask", model_folder, *first, "-i", "--image", files / "a.png", *SHORT)
    answer = model.generate(questions[0], files / "a.png", max_new_tokens=12)
    turns = [
        Turn("user", f"<image>\n{questions[0]}"),
        Turn("assistant", answer),
        Turn("user", questions[1]),
    ]
    follow_up = model.generate(turns, files / "a.png", max_new_tokens=12)
    assert (status, out, err) == (0, f"{answer}\n{follow_up}\n", "")


def test_a_question_that_cannot_be_asked_does_not_end_a_conversation(
    run: Run, model: Model, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["what is this <image> ?", "digits " * 300, "which \udcff digit", QUESTION]
    content = io.BytesIO("\n".join(lines).encode(errors="surrogateescape"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content, encoding="utf-8"))
    status, out, err = run("ask", model_folder, "-i", *SHORT)
    assert (status, out) == (2, f"{model.generate(QUESTION, max_new_tokens=12)}\n")
    said = err.splitlines()
    assert len(said) == 3 and all(line.startswith("llava-mini: the ") for line in said)


def test_ctrl_c_ends_an_answer_and_at_the_prompt_the_conversation(
    run: Run, model: Model, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push, left = AnswerText.push, [2]

    def interrupted(text: AnswerText, ids: Iterable[int]) -> str:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return push(text, ids)

    monkeypatch.setattr(AnswerText, "push", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n{QUESTION}\n"))
    status, out, err = run("ask", model_folder, "-i", *SHORT)
    begun, whole = out.splitlines()
    assert (status, err, whole) == (0, "", model.generate(QUESTION, max_new_tokens=12))
    assert begun and whole.startswith(begun.strip()) and len(begun) < len(whole)

    def typed() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False, readline=typed))
    assert run("ask", model_folder, "-i") == (130, "", "")
    left[0] = 1
    assert run("ask", model_folder, QUESTION) == (130, "", "")


def test_people_at_a_terminal_see_more(
    run: Run, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    status, out, err = run("ask", model_folder, QUESTION, *SHORT)
    assert status == 0 and "[12 tokens in" in err and "--max-new-tokens" in err
    assert "12 tokens" not in out
    status, out, err = run("convert", model_folder, tmp_path / "out")
    assert status == 0 and out == "" and re.search(r"parameters, \d+\.\d kB", err)


def test_a_dry_run_tells_what_a_video_takes_and_reads_no_weights(
    run: Run, files: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the weights are read")

    monkeypatch.setattr("llava_mini_jax.weights.import_hf.load_params", refuse)
    status, out, _ = run("ask", model_folder, "--video", files / "clip.mp4", "--dry-run", QUESTION)
    assert status == 0
    first = out.splitlines()[0]
    assert first.startswith("positions") and "3 of 3 frames" in first and "256" in first
    for term in ("KV cache", "weights", "host", "passes"):
        assert term in out


def with_bos(model: Path) -> Path:
    """The model's tokenizer then begins every text with a bos, as LLaMA's does."""
    path = model / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    bos = json.loads((model / "tokenizer_config.json").read_text())["bos_token"]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.save(str(path))
    return model


def test_a_dry_run_is_of_the_same_model_and_prompt(
    run: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = files / "a.png"
    twice = with_bos(Path(shutil.copytree(tiny_model.folder("release"), tmp_path / "release")))
    asked = llava_mini_jax.load(twice)
    text = int((asked.request(QUESTION, asked.read_pictures(picture, None)).ids >= 0).sum())
    _, out, _ = run("ask", twice, "--image", picture, "--dry-run", QUESTION)
    assert f"+ {text} of text" in out
    _, out, _ = run("ask", twice, "--dry-run", QUESTION, "--max-length", 99, "--conv-mode", "brief")
    assert "of the model's 99" in out and f"+ {text} of text" not in out
    clip, _ = tiny_model.write_parts(tmp_path)
    arrays = {name: array for name, array in tensors(twice).items() if "vision_tower" not in name}
    save_file(arrays, twice / "model.safetensors")
    assert run("ask", twice, "--dry-run", QUESTION)[0] == 2
    status, out, _ = run("ask", twice, "--dry-run", QUESTION, "--vision-tower", clip)
    assert status == 0 and out.startswith("positions")


def test_ask_says_when_the_context_is_full(run: Run) -> None:
    status, out, err = run("ask", tiny_model.folder("paper", positions=64), QUESTION)
    assert status == 0 and out.strip()
    assert err.count("\n") == 1 and "fill all 64 positions" in err


def test_as_a_program(model_folder: Path, files: Path) -> None:
    """A real process: nothing but the answer is printed, and a closed pipe is no fault."""
    program_code = "import sys; from llava_mini_jax.cli import main; sys.exit(main())"
    start = [sys.executable, "-c", program_code]
    picture = str(files / "a.png")
    ask = [*start, "ask", str(model_folder), "--image", picture, QUESTION, *SHORT]
    done = subprocess.run(ask, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    closed, pipe = os.pipe()
    os.close(closed)
    done = subprocess.run(
        [*start, "inspect", str(model_folder)], stdout=pipe, stderr=subprocess.PIPE, text=True
    )
    os.close(pipe)
    assert (done.returncode, done.stderr) == (141, "")


def test_ctrl_c_is_quiet(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify_command, "run", interrupted)
    assert run("verify", "case") == (130, "", "")


@pytest.mark.parametrize("command", ["", *cli.COMMANDS], ids=lambda name: name or "none")
def test_help_and_version(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and "example" in out and len(out.splitlines()) < 50
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"llava-mini {llava_mini_jax.__version__}\n"


# --- convert --------------------------------------------------------------------------------------


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def assert_same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert array.dtype == second[name].dtype and array.tobytes() == second[name].tobytes(), name


@pytest.mark.parametrize(
    ("dialect", "formats"),
    [
        ("paper", ["release", "release"]),
        ("release", ["release"]),
        ("llava-1.5", ["llava-1.5", "llava-hf", "release"]),
    ],
)
def test_conversions_there_and_back_are_bit_identical(
    run: Run, tmp_path: Path, dialect: str, formats: list[str]
) -> None:
    source = here = tiny_model.folder(dialect)
    for number, name in enumerate(formats):
        there = tmp_path / f"{number}"
        assert run("convert", here, there, "--format", name) == (0, "", "")
        opened = llava_mini_jax.load(there)
        assert opened.bundle.model == llava_mini_jax.load(source).bundle.model
        here = there
    assert_same(tensors(source), tensors(here))
    assert {path.name for path in source.iterdir()} == {path.name for path in here.iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(n) for n in range(len(formats))]


def test_convert_to_another_dtype(run: Run, model_folder: Path, tmp_path: Path) -> None:
    assert run("convert", model_folder, tmp_path / "half", "--dtype", "bfloat16")[0] == 0
    whole, half = tensors(model_folder), tensors(tmp_path / "half")
    assert all(half[name].tobytes() == a.astype("bfloat16").tobytes() for name, a in whole.items())
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_start_of_a_training_run(run: Run, tmp_path: Path) -> None:
    clip, llm = tiny_model.write_parts(tmp_path)

    def start(name: str, *options: object) -> dict[str, np.ndarray]:
        parts = ("--clip", clip, "--llm", llm, "--prefusion-layers", 1)
        status, _, err = run("convert", *parts, tmp_path / name, *options)
        assert (status, err) == (0, "")
        return tensors(tmp_path / name)

    paper = start("paper", "--grid", 2)
    source = tensors(tiny_model.folder("llava-1.5"))
    new = {name for name in paper if name not in source or "projector" in name}
    assert_same(
        {n: paper[n] for n in paper.keys() - new}, {n: source[n] for n in source.keys() - new}
    )
    assert all("projector" in n or "compressor" in n or "prefusion" in n for n in new)
    options = ("--dialect", "release", "--prefusion-init", "copy", "--seed", 1)
    copy = start("copy", *options)
    projector = "model.mm_projector.0.weight"
    assert not np.array_equal(paper[projector], copy[projector]), "another seed"
    fresh, own = "model.prefusion_layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"
    assert np.array_equal(copy[fresh], copy[own]) and not np.array_equal(paper[fresh], paper[own])
    opened = llava_mini_jax.load(tmp_path / "copy")
    assert opened.bundle.prompt.template == "vicuna_v1" and opened.bundle.eos_ids == (2,)
    assert llava_mini_jax.load(tmp_path / "paper").bundle.model.compressor.grid == 2
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"} <= names


# --- inspect --------------------------------------------------------------------------------------


def component(out: str, name: str) -> list[int]:
    """The numbers with separators of a component's line: parameters, bytes, trained, trained."""
    (line,) = [line for line in out.splitlines() if re.match(rf"{name} +[\d,]+ ", line)]
    return [int(word.replace(",", "")) for word in re.findall(r"(?<= )[\d,]+(?= |$)", line)]


@pytest.mark.parametrize("dialect", ["paper", "release", "llava-1.5"])
def test_inspect_counts_what_the_file_holds(run: Run, dialect: str) -> None:
    folder = tiny_model.folder(dialect)
    status, out, err = run("inspect", folder)
    arrays = tensors(folder)
    total = sum(array.size for array in arrays.values())
    vision = sum(array.size for name, array in arrays.items() if "vision_tower" in name)
    projector = sum(array.size for name, array in arrays.items() if "projector" in name)
    assert (status, err) == (0, "")
    assert component(out, "total") == [total, 4 * total, projector, total - vision]
    assert component(out, "vision") == [vision, 4 * vision, 0, 0]
    assert f"dialect: {dialect}" in out and "model.llm.vocab_size: 85" in out
    assert re.search(r"^llm/layers/q_proj +1x4x8x32 +float32 +frozen +trained$", out, re.MULTILINE)


def test_inspect_names_stored_dtypes(run: Run, copied: Path) -> None:
    arrays = tensors(copied)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(arrays | {name: arrays[name].astype(np.float16)}, copied / "model.safetensors")
    out = run("inspect", copied)[1]
    assert re.search(r"^llm/layers/up_proj +1x48x32 +float16 ", out, re.MULTILINE)
    assert re.search(r"^llm/layers/gate_proj +1x48x32 +float32 ", out, re.MULTILINE)


# Published sizes: LLaMA-7B, -13B and 3.1-8B; CLIP ViT-L/14-336's vision half.
@pytest.mark.parametrize(
    ("name", "width", "llm"),
    [
        ("vicuna-7b", 4096, 6_738_415_616),
        ("vicuna-13b", 5120, 13_015_864_320),
        ("llama-3.1-8b", 4096, 8_030_261_248),
    ],
)
def test_inspect_named_shapes(run: Run, name: str, width: int, llm: int) -> None:
    status, out, _ = run("inspect", "--abstract", name, "--mesh", "fsdp=4,tensor=2")
    projector = 1024 * width + width + width * width + width
    assert status == 0
    assert component(out, "llm") == [llm, 2 * llm, 0, llm]
    assert component(out, "vision")[0] == 303_507_456
    assert component(out, "projector") == [projector, 2 * projector, projector, projector]
    assert re.search(
        rf"^llm/layers/down_proj +\d+x{width}x\d+ +bfloat16 +-,fsdp,tensor ", out, re.M
    )
    assert re.search(r"^total .* [\d.]+ GB +[\d.]+ GB ", out, re.MULTILINE)


def test_inspect_variants_of_named_shapes(run: Run) -> None:
    options = ("--dialect", "release", "--grid", 2, "--prefusion-layers", 0)
    _, out, _ = run("inspect", "--abstract", "llama-3.1-8b", *options)
    assert "prefusion/" not in out and re.search(r"^compressor/query +4x1024 ", out, re.MULTILINE)


# --- verify ---------------------------------------------------------------------------------------


def test_verify_finds_the_one_wrong_array(run: Run, shared_golden: Path, tmp_path: Path) -> None:
    case = Path(shutil.copytree(shared_golden / "model" / "llava15_baseline", tmp_path / "case"))
    for path in (case, *case.rglob("*")):
        path.chmod(0o755)
    outputs = dict(np.load(case / "outputs.npz"))
    outputs["projected_features"] = outputs["projected_features"] + 1
    np.savez(case / "outputs.npz", **outputs)
    status, out, err = run("verify", case)
    lines = [line for line in out.splitlines() if "largest error" in line]
    assert (status, err, len(lines)) == (1, "", len(outputs))
    assert [line.split()[0] for line in lines if not line.endswith(" ok")] == ["projected_features"]
    assert out.splitlines()[-2:] == [
        f"1 cases, {len(lines)} arrays, 1 failed",
        f"  {case}: projected_features",
    ]


def test_verify_goes_on_after_a_failure(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(case: Path):
        if case.name == "crash":
            raise KeyError("logits")
        if case.name == "README.md":
            raise InputError("README.md is not a golden case")
        yield verify_module.Check("logits", (2, 3), 1e-5, 1e-4)

    monkeypatch.setattr(verify_module, "verify", fake)
    status, out, err = run("verify", "crash", "good")
    assert (status, err) == (1, "") and "FAILED with KeyError: 'logits'" in out
    assert "== good" in out and "2 cases, 2 arrays, 1 failed" in out
    assert run("verify", "good")[0] == 0
    status, out, err = run("verify", "README.md", "good")
    assert (status, err) == (2, "llava-mini: README.md is not a golden case\n")
    assert out.splitlines()[-1] == "1 cases, 1 arrays, 0 failed; 1 could not be read"
