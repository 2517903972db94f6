"""What the package warns of reaches people as one line, in all front doors alike; what libraries
say of themselves does not."""

import re
import subprocess
import sys

from tests.conftest import ROOT

PROGRAM = """
import sys, warnings
from llava_mini_jax import signals

def program():
    warnings.warn("two models side by side: the first is read", stacklevel=1)
    warnings.warn("old", DeprecationWarning, stacklevel=1)
    return 0

warnings.simplefilter("always")
signals.run(program, "stopped")
"""


def test_a_warning_is_a_line_without_its_place_in_the_code() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert (done.returncode, lines[0]) == (0, "two models side by side: the first is read")
    assert "DeprecationWarning: old" in lines[1]  # for those who write programs with it


# Both ways to transformers: a folder's tokenizer, and the digits world's (llava-mini profile).
QUIET = """
import sys
from llava_mini_jax.data.digits.pages import build_tokenizer
from llava_mini_jax.data.text.tokenizer import load_tokenizer

build_tokenizer().save_pretrained(sys.argv[1])
print(load_tokenizer(sys.argv[1]).is_fast)
"""


def test_transformers_does_not_greet_those_without_torch(tmp_path) -> None:
    command = [sys.executable, "-c", QUIET, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_nothing_imports_transformers_by_itself() -> None:
    """Whoever does wakes the greeting, of which `environment.transformers` knows."""
    own = r"(?m)^ *(?:import transformers|from transformers[. ])"
    found = {
        path.relative_to(ROOT).as_posix(): re.findall(own, path.read_text())
        for path in (ROOT / "llava_mini_jax").rglob("*.py")
    }
    # For types alone, which no program reads.
    assert [path for path, lines in found.items() if lines] == [
        "llava_mini_jax/data/digits/pages.py"
    ]
    assert len(found["llava_mini_jax/data/digits/pages.py"]) == 1
