"""Rooms: no import runs back up, none goes in a circle, every room says what it is."""

import ast
import graphlib

import pytest

from tests import structure

TREES = structure.modules(structure.ROOT)


def test_every_module_lies_in_a_room():
    assert structure.unplaced(TREES) == []


def test_no_import_runs_back_up():
    assert structure.upward(TREES) == []


def test_no_import_goes_in_a_circle():
    edges = {name: structure.imports(tree, set(TREES)) - {name, ""} for name, tree in TREES.items()}
    graphlib.TopologicalSorter(edges).prepare()  # raises CycleError, which names the circle


FOLDERS = [name for name in TREES if name and any(n.startswith(f"{name}.") for n in TREES)]


@pytest.mark.parametrize("name", FOLDERS)
def test_every_folder_says_in_a_sentence_what_it_holds(name):
    said = (ast.get_docstring(TREES[name]) or "").split("\n\n")[0]
    assert said.endswith(".") and len(said) > 40


def test_an_import_that_runs_up_is_seen():
    trees = dict(TREES, **{"ops.norm": ast.parse(f"from {structure.PACKAGE}.models import llama")})
    assert structure.upward(trees) == [("ops.norm", "models.llama")]
