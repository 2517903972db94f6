"""The stable interface: its names, what they say of themselves, and what importing them costs."""

import inspect
import subprocess
import sys

import pytest

import llava_mini_jax
from tests.conftest import ROOT

NAMES = sorted(set(llava_mini_jax.__all__) - {"__version__"})


def test_the_names_are_these():
    """One that is missing here was taken from people who use it."""
    assert NAMES == [
        "Budget",
        "FrameSampling",
        "InputError",
        "Model",
        "Session",
        "Settings",
        "Turn",
        "load",
    ]
    assert set(NAMES) <= set(dir(llava_mini_jax))
    with pytest.raises(AttributeError, match="has no attribute 'nosuch'"):
        llava_mini_jax.nosuch  # noqa: B018


@pytest.mark.parametrize("name", NAMES)
def test_each_name_says_what_it_is(name):
    found = getattr(llava_mini_jax, name)
    own = found.__dict__.get("__doc__") if inspect.isclass(found) else found.__doc__
    assert own and not own.startswith(f"{name}("), "a docstring, not what dataclasses make up"
    assert f"`{name}`" in (ROOT / "README.md").read_text() and f"`{name}`" in llava_mini_jax.__doc__


def test_importing_the_package_imports_no_jax():
    code = "import sys, llava_mini_jax; llava_mini_jax.InputError; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_package_runs_as_the_command():
    words = [sys.executable, "-m", "llava_mini_jax", "--version"]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (said.returncode, said.stdout.split()[-1]) == (0, llava_mini_jax.__version__)
