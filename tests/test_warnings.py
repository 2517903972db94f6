"""What the package warns of reaches people as one line, in all front doors alike."""

import subprocess
import sys

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
