"""Which benchmarks there are, and what asking for one of them imports."""

import subprocess
import sys
from pathlib import Path

import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation import benchmark
from llava_mini_jax.evaluation.benchmark import all_names, find, names_of_paper


def test_every_name_is_found_and_stands_once():
    names = all_names()
    assert len(set(names)) == len(names)
    assert [find(name).name for name in names] == names
    assert set(names_of_paper()) < set(names) and "vqav2_val" not in names_of_paper()


def test_every_file_defines_a_benchmark():
    folder = Path(benchmark.__file__).parent
    files = {path.stem for kind in ("image", "video") for path in (folder / kind).glob("[!_]*.py")}
    assert {benchmark._FILE_OF.get(name, name) for name in all_names()} == files


@pytest.mark.parametrize("name", ["pop", "video_qa", "", "pope.py", "..pope", "__init__"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(InputError, match=r"is unknown; known: digits, .*pope, .*video_chatgpt"):
        find(name)


@pytest.mark.parametrize("name, file", [("pope", "image.pope"), ("msvd_qa", "video.video_qa")])
def test_one_benchmark_imports_its_file_alone(name, file):
    asked = (
        f"from llava_mini_jax.evaluation.benchmark import find; find({name!r}); import sys;"
        "print(*(m for m in sys.modules if '.evaluation.image.' in m or '.evaluation.video.' in m))"
    )
    command = [sys.executable, "-c", asked]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [f"llava_mini_jax.evaluation.{file}"]
