"""Which tests are `long`: those whose cases together took over four seconds when all were measured.

`make test` leaves them out, so that it ends within ten minutes on two cores; `.ci/run` has a step
for them. tests/long_tests.txt has their names. Measure again when many tests have changed, on a
machine that does nothing else:

    rm -rf .pytest_cache/jax
    make test ARGS="-m 'not slow' --junitxml=out/tests.xml"
    .venv/bin/python -m tests.long_tests out/tests.xml

`slow` says something else: a proof that nobody waits for, marked where it is written.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

import pytest

LIST = Path(__file__).with_suffix(".txt")
SECONDS = 4.0


def names() -> list[str]:
    """Of the long tests, as pytest writes them: tests/a/test_b.py::test_c."""
    return LIST.read_text().splitlines()


def mark(items: Iterable[pytest.Item]) -> None:
    """Marks those of the collected tests that the list names, and that are not slow anyway."""
    listed = set(names())
    for item in items:
        slow = item.get_closest_marker("slow") is not None
        if not slow and item.nodeid.partition("[")[0] in listed:
            item.add_marker(pytest.mark.long)


def seconds_by_test(report: Path) -> dict[str, float]:
    """What each test's cases took together, from a report in JUnit's format."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.attrib["classname"].replace(".", "/") + ".py"
        test, _, _ = case.attrib["name"].partition("[")
        seconds[f"{file}::{test}"] += float(case.attrib["time"])
    return dict(seconds)


def measured(report: Path) -> list[str]:
    """Names of the tests that took long. ValueError if the report is not one of all tests."""
    seconds = seconds_by_test(report)
    if missing := set(names()) - seconds.keys():
        raise ValueError(f"{report} has no {min(missing)}: give the report of a run of all tests")
    return sorted(name for name, taken in seconds.items() if taken > SECONDS)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes tests/long_tests.txt.")
    parser.add_argument("report", type=Path, help="of pytest --junitxml, over all tests")
    try:
        found = measured(parser.parse_args().report)
    except ValueError as error:
        parser.error(str(error))
    LIST.write_text("".join(f"{name}\n" for name in found))
    print(f"{len(found)} tests took more than {SECONDS:g} s")


if __name__ == "__main__":
    main()
