"""`llava-mini completion`: bash completes with its script; zsh's and fish's know the same words."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_mini_jax import cli
from llava_mini_jax.arguments import BACKBONES
from llava_mini_jax.cli import completion

pytest.importorskip("shtab", reason="the extra completion is not installed")
Completed = Callable[..., list[str]]
# What bash does once Tab is pressed behind the last word.
TAB = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_shtab_llava_mini llava-mini "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["completion", shell]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


@pytest.fixture
def completed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Completed:
    """What stands to choose behind these words, the last of which is half typed."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash here")
    source, here = tmp_path / "completion.bash", tmp_path / "here"
    source.write_text(script("bash", capsys))
    (here / "models" / "one").mkdir(parents=True)
    (here / "movie.mp4").touch()

    def completed(*words: str) -> list[str]:
        command = [bash, "--norc", "-c", TAB, "bash", str(source), "llava-mini", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=here)
        assert done.returncode == 0, done.stderr
        return sorted(done.stdout.split())

    return completed


def test_bash_completes(completed: Completed) -> None:
    assert completed("") == sorted(cli.COMMANDS)
    assert completed("pro") == ["profile"]
    assert completed("profile", "") == sorted(cli.kinds_of("profile"))
    assert completed("profile", "latency", "--llm") == ["--llm-layers"]
    assert completed("ask", "M", "--im") == ["--image"]
    assert completed("ask", "mo") == ["models"], "a model is a folder"
    assert completed("ask", "M", "--video", "mo") == ["models", "movie.mp4"]
    assert completed("inspect", "--abstract", "") == sorted(BACKBONES)
    assert completed("completion", "") == sorted(completion.SHELLS)


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_scripts_know_every_command_and_option(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = script(shell, capsys)
    for words, parser in cli.all_parsers().items():
        options = [option for action in parser._actions for option in action.option_strings]
        # fish has them without dashes, behind -l.
        wanted = [option.removeprefix("--") for option in options] + [*words]
        assert [word for word in wanted if word not in text] == []


def test_without_shtab_the_extra_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["completion", "bash"]) == 2
    said = "llava-mini completion needs shtab: pip install 'llava-mini-jax[completion]'\n"
    assert capsys.readouterr().err == f"llava-mini: {said}"
