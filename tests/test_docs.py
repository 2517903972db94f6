"""docs/release.md and the code cite each other: headings, files and functions are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = "docs/release.md"


def python_files() -> list[Path]:
    places = ("llava_mini_jax", "tests", "configs")
    found = [path for place in places for path in (ROOT / place).rglob("*.py")]
    return [path for path in found if path != Path(__file__)]


def test_cited_headings_are_there() -> None:
    headings = set(re.findall("(?m)^## (.*)$", (ROOT / PAGE).read_text()))
    cited = set()
    for path in python_files():
        text = re.sub(r"\s+(# )?", " ", path.read_text())
        of_page = re.findall(rf'{PAGE}[,:] "([^"]+)"', text)
        assert len(of_page) == text.count(PAGE), f"{path} cites {PAGE} without a heading"
        cited |= set(of_page)
    assert cited and cited <= headings


@pytest.mark.parametrize("page, fewest", [(PAGE, 50), ("docs/architecture.md", 30)])
def test_files_and_functions_that_a_page_names_are_there(page: str, fewest: int) -> None:
    named = re.findall(r"`([\w/]+\.py): ([\w., ]+)`", (ROOT / page).read_text())
    assert len(named) >= fewest
    for file, names in named:
        path = ROOT / file if file.startswith("configs/") else ROOT / "llava_mini_jax" / file
        assert path.is_file(), f"{page} names {file}"
        for name in names.split(", "):
            outer, _, method = name.partition(".")
            defined = rf"(?m)^((async )?def {outer}\(|class {outer}\b|{outer}\b.* = )"
            assert re.search(defined, path.read_text()), f"{page} names {name} of {file}"
            method_of = rf"(?m)^    (async )?def {method}\("
            assert not method or re.search(method_of, path.read_text()), f"{page} names {name}"


def test_every_module_stands_in_the_table_of_rooms() -> None:
    """Benchmarks and subcommands, a file each, go by their room."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page.split("## Where things are")[1].split("\n## ")[0]
    files = [
        path.relative_to(ROOT / "llava_mini_jax")
        for path in (ROOT / "llava_mini_jax").rglob("*.py")
    ]
    own = [
        f for f in files if not f.stem.startswith("__") and f.parts[0] not in ("cli", "evaluation")
    ]
    assert [str(f) for f in own if not re.search(rf"\b{f.stem}\b", table)] == []
