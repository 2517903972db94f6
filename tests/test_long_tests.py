"""The list of long tests names tests that are there, and the marker reaches them."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests import long_tests

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", long_tests.names())
def test_every_name_is_that_of_a_test(name):
    file, _, test = name.partition("::")
    assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.M)


def test_names_are_sorted_and_each_is_there_once():
    assert long_tests.names() == sorted(set(long_tests.names()))


class Item:
    """What `mark` needs of a collected test."""

    def __init__(self, nodeid: str, *marks: str):
        self.nodeid, self.marks = nodeid, list(marks)

    def get_closest_marker(self, name: str) -> str | None:
        return name if name in self.marks else None

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.marks.append(mark.name)


def test_cases_count_together_and_all_of_them_are_marked(tmp_path, monkeypatch):
    cases = (
        f'<testcase classname="tests.a.test_b" name="{name}" time="{seconds}"/>'
        for name, seconds in (("test_c[1]", 2.5), ("test_c[2]", 1.9), ("test_d", 3.9))
    )
    report = tmp_path / "tests.xml"
    report.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    with pytest.raises(ValueError, match="a run of all tests"):
        long_tests.measured(report)  # which lacks the tests of the list
    monkeypatch.setattr(long_tests, "names", lambda: ["tests/a/test_b.py::test_d"])
    found = long_tests.measured(report)
    assert found == ["tests/a/test_b.py::test_c"]
    monkeypatch.setattr(long_tests, "names", lambda: found)
    items: Any = [
        Item(f"tests/a/test_b.py::{name}") for name in ("test_c[1]", "test_c[2]", "test_d")
    ]
    long_tests.mark(items)
    assert [item.marks for item in items] == [["long"], ["long"], []]


def test_a_slow_case_is_slow_alone(monkeypatch):
    monkeypatch.setattr(long_tests, "names", lambda: ["tests/a/test_b.py::test_c"])
    slow: Any = Item("tests/a/test_b.py::test_c[1]", "slow")
    long_tests.mark([slow])
    assert slow.marks == ["slow"]
