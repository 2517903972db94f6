"""The structure of the package in figures, of this tree and of other commits side by side.

    python -m tests.structure [COMMIT ...]

A module's room is the longest name of FLOORS that it lies in. Every import goes down, to a room on
a lower floor, or stays in its room; tests/test_structure.py holds the tree to that.
"""

import argparse
import ast
import io
import subprocess
import tarfile
import tempfile
import tokenize
from collections import Counter
from pathlib import Path

PACKAGE = "llava_mini_jax"
ROOT = Path(__file__).resolve().parents[1]

# Ground first. "" is the package's own __init__, which hands out the public names.
FLOORS = (
    ("errors", "torus"),
    ("arguments", "environment", "journal", "json_fields", "plots", "signals", "terminal"),
    ("compilation", "sharding", "distributed", "tensorfiles"),
    ("params",),
    ("ops",),
    ("models",),
    ("data.sample",),
    ("data.prompt", "data.media", "data.text", "data.digits"),
    ("data.sets",),
    ("data.batches",),
    ("backbones",),
    ("config",),
    ("weights",),
    ("inference",),
    ("",),
    ("cost",),
    ("training",),
    ("evaluation.benchmark", "evaluation.xlsx"),
    ("evaluation.layouts",),
    ("evaluation.rules", "evaluation.judge"),
    ("evaluation.image", "evaluation.video"),
    ("evaluation.run",),
    ("analysis",),
    ("reproduce",),
    ("integrations", "serving"),
    ("cli",),
    ("__main__",),
)
_FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules(root: Path) -> dict[str, ast.Module]:
    """Every module of the package by its name below it: "data.media.images", "" for the package."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root / PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(), str(path))
    return found


def imports(tree: ast.Module, names: set[str]) -> set[str]:
    """Modules of the package that a module imports anywhere in its text, in functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            below = (node.module or "").removeprefix(PACKAGE).removeprefix(".")
            for alias in node.names:
                inner = f"{below}.{alias.name}".removeprefix(".")
                found.add(inner if inner in names else below)
        elif isinstance(node, ast.Import):
            given = [a.name for a in node.names if a.name.split(".")[0] == PACKAGE]
            found |= {name.removeprefix(PACKAGE).removeprefix(".") for name in given}
    return found


def room(module: str) -> str:
    """The room of FLOORS, or the first part of its name where there is none."""
    parts = module.split(".")
    tried = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((name for name in tried if name in _FLOOR), parts[0])


def _floor(place: str) -> int | None:
    """Of a whole folder (`data` of an earlier tree): that of its lowest room."""
    inside = [floor for name, floor in _FLOOR.items() if name.split(".")[0] == place]
    return _FLOOR.get(place, min(inside, default=None))


def upward(trees: dict[str, ast.Module]) -> list[tuple[str, str]]:
    """(module, what it imports), wherever that does not lie on a lower floor or in its room."""
    found = []
    for module, tree in trees.items():
        for target in imports(tree, set(trees)):
            here, there = room(module), room(target)
            at, below = _floor(here), _floor(there)
            # A package that holds rooms is a docstring.
            if here != there and at is not None and below is not None and below >= at:
                found.append((module, target))
    return sorted(found)


def unplaced(trees: dict[str, ast.Module]) -> list[str]:
    """Modules with code that lie in no room."""
    return [name for name, tree in trees.items() if room(name) not in _FLOOR and tree.body[1:]]


def _functions(trees: dict[str, ast.Module]) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, kinds)]


def _prose(text: str, tree: ast.Module) -> int:
    """Lines that compute nothing: blank ones, comments, docstrings and imports."""
    said = sum(not line.strip() or line.strip().startswith("#") for line in text.splitlines())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            said += (node.end_lineno or 0) - node.lineno + 1
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            doc = node.body[0]
            inside = text.splitlines()[doc.lineno - 1 : doc.end_lineno]
            said += sum(bool(line.strip()) for line in inside)
    return said


def figures(root: Path) -> dict[str, int | str]:
    """What this file's command prints of one tree."""
    trees, texts = modules(root), [p.read_text() for p in (root / PACKAGE).rglob("*.py")]
    lengths = [text.count("\n") for text in texts]
    functions = _functions(trees)
    spans = [(node.end_lineno or 0) - node.lineno + 1 for node in functions]
    comments = sum(
        token.type == tokenize.COMMENT
        for text in texts
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
    )
    lines = Counter()
    for name in trees:
        path = root / PACKAGE / name.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        lines[name.split(".")[0] if "." in name or path.name == "__init__.py" else "."] += (
            path.read_text().count("\n")
        )
    return {
        "files": len(texts),
        "files over 300 lines": sum(length > 300 for length in lengths),
        "functions over 40 lines": sum(span > 40 for span in spans),
        "functions over 70 lines": sum(span > 70 for span in spans),
        "imports that run back up": len(upward(trees)),
        "modules in no room": len(unplaced(trees)),
        "files that name inside_layers": sum("inside_layers" in text for text in texts),
        "functions named read_*": sum(f.name.lstrip("_").startswith("read_") for f in functions),
        "comments": comments,
        **{f"lines in {place or '.'}": lines[place] for place in sorted(lines)},
        "lines in all": sum(lengths),
        "lines of code": sum(lengths) - sum(_prose(text, ast.parse(text)) for text in texts),
    }


def _of_commit(commit: str) -> dict[str, int | str]:
    packed = subprocess.run(
        ["git", "archive", commit, PACKAGE], cwd=ROOT, check=True, capture_output=True
    ).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(folder, filter="data")
        return figures(Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.structure", description=__doc__)
    parser.add_argument("commits", nargs="*", metavar="COMMIT", help="earlier trees to compare")
    columns = {commit: _of_commit(commit) for commit in parser.parse_args().commits}
    columns["this tree"] = figures(ROOT)
    names = dict.fromkeys(name for column in columns.values() for name in column)
    print(f"{'':32}", *(f"{title[:12]:>12}" for title in columns))
    for name in names:
        print(f"{name:32}", *(f"{column.get(name, 0):>12}" for column in columns.values()))
    for module, target in upward(modules(ROOT)):
        print(f"up: {module} -> {target}")


if __name__ == "__main__":
    main()
