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


def rooms_imported_by(place: str) -> set[str]:
    own = [name for name in TREES if structure.room(name) == place]
    found = (structure.imports(TREES[name], set(TREES)) for name in own)
    return {structure.room(target) for targets in found for target in targets} - {place}


def test_rooms_that_say_alone_import_nothing_else():
    assert rooms_imported_by("tensorfiles") == rooms_imported_by("data.media") == {"errors"}
    assert rooms_imported_by("models") == {"ops", "params", "sharding"}
    assert "inference" not in rooms_imported_by("training")


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
