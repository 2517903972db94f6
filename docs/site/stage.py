"""make docs: the pages of README.md, docs/ and the commands' help as one site.

README.md, CONTRIBUTING.md, CHANGELOG.md, docs/ --links rewritten--> SOURCE/ --sphinx-build--> html
argparse's help, tyro's help, public docstrings --> SOURCE/reference/

python docs/site/stage.py SOURCE
"""

import contextlib
import dataclasses
import io
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
# A picture with a dark twin, as GitHub wants it.
TWINS = re.compile(
    r'<picture>\s*<source [^>]*srcset="([^"]+)">\s*<img src="([^"]+)" alt="([^"]+)">\s*</picture>'
)
# The site's parts, and the pages of each.
PARTS = {
    "Start": ("tutorial", "commands", "from_pytorch", "troubleshooting", "not_here"),
    "How to": ("data", "finetune", "training", "sharding", "serving", "evaluation", "video"),
    "Reference": ("reference/api", "reference/commands", "reference/config", "weights"),
    "Explanation": ("architecture", "release", "performance", "analysis", "results"),
    "Project": ("contributing", "changelog"),
}
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"} | {
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
CONFIG = "stage2_vicuna_7b"  # whose values the table of fields shows
API = ("load", "Model", "Session", "Settings", "Turn", "FrameSampling", "Budget", "InputError")


def main(source: Path) -> None:
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "docs", source, ignore=shutil.ignore_patterns("site"))
    shutil.copy(ROOT / "docs" / "site" / "conf.py", source)
    for page in source.rglob("*.md"):
        own = (ROOT / "docs" / page.relative_to(source)).parent
        page.write_text(relinked(page.read_text(), own, page.parent, source))
    for name, target in PAGES.items():
        text = relinked((ROOT / name).read_text(), ROOT, source, source)
        (source / target).write_text(text + (contents() if target == "index.md" else ""))
    (source / "reference").mkdir()
    (source / "reference" / "api.md").write_text(api())
    (source / "reference" / "commands.md").write_text(commands())
    (source / "reference" / "config.md").write_text(fields())


def relinked(text: str, own: Path, place: Path, source: Path) -> str:
    """A page whose file lay in `own`, for one in `place`: its links lead to the site's pages.

    What is not on the site (the licence, configs) is no link there.
    """

    def moved(match: re.Match) -> str:
        words, target = match.groups()
        name, _, anchor = target.partition("#")
        if re.match(r"https?://|mailto:", target) or not name:
            return match[0]
        path = (own / name).resolve().relative_to(ROOT).as_posix()
        if path in PAGES:
            path = PAGES[path]
        elif path.startswith("docs/") and (ROOT / path).is_file():
            path = path.removeprefix("docs/")
        else:
            return f"`{path}`"
        found = os.path.relpath(source / path, place)
        return f"{words}({found}{'#' * bool(anchor)}{anchor})"

    # Of twins the site's theme shows the one that fits.
    text = TWINS.sub(r"![\3](\2){.only-light}\n![\3](\1){.only-dark}", text)
    return LINK.sub(moved, text)


def contents() -> str:
    """Every page of the site, by part; those of results and others under none."""
    lists = [
        "\n".join(["```{toctree}", ":hidden:", f":caption: {part}", "", *pages, "```"])
        for part, pages in PARTS.items()
    ]
    rest = ["```{toctree}", ":hidden:", ":glob:", "", "security", "results/*", "```"]
    return "\n\n".join(["", *lists, "\n".join(rest), ""])


def api() -> str:
    directives = [f".. autoclass:: llava_mini_jax.{name}\n   :members:" for name in API[1:]]
    directives.insert(0, f".. autofunction:: llava_mini_jax.{API[0]}")
    blocks = [f"```{{eval-rst}}\n{each}\n```" for each in directives]
    return "\n\n".join(
        ["# Python", "The stable interface; everything else may change.", *blocks, ""]
    )


def commands() -> str:
    from llava_mini_jax import cli

    pages = [
        f"## llava-mini {' '.join(words)}\n\n{block(said(cli.main, [*words]))}"
        for words in sorted(cli.all_parsers())
    ]
    sys.path.insert(0, str(ROOT))
    import eval as evaluation

    pages.append(f"## eval.py\n\n{block(said(evaluation.main, []))}")
    return "# Commands\n\n" + "\n\n".join(pages) + "\n"


def fields() -> str:
    """Every field of a stage and of what it holds: its meaning, as the comment beside it says, and
    its value in one config."""
    from llava_mini_jax.arguments import comments
    from llava_mini_jax.training.stages import load_config, stages_of

    (stage,) = stages_of(load_config(str(ROOT / "configs" / f"{CONFIG}.py")))
    about = "On the command line a field is `--PATH VALUE`: `--optimizer.learning-rate 1e-5`."
    lines = ["# Fields of a config", "", f"{about} Values are those of `configs/{CONFIG}.py`.", ""]
    for path, value in tables("", stage):
        lines += [f"## {path or 'A stage'}", "", "| field | type | value | |", "|---|---|---|---|"]
        meaning = {name: text.replace("|", "\\|") for name, text in comments(type(value)).items()}
        for field in dataclasses.fields(value):
            own = getattr(value, field.name)
            shown = f"`{own!r:.70}`".replace("|", "or")
            if is_table(own):
                shown = f"[below](#{path.replace('.', '')}{field.name})"
            kind = getattr(field.type, "__name__", str(field.type))
            kind = re.sub(r"\b[a-z_]\w*\.", "", kind).replace("|", "or")
            lines.append(f"| `{field.name}` | `{kind}` | {shown} | {meaning[field.name]} |")
        lines.append("")
    return "\n".join(lines)


def is_table(value: object) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def tables(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A dataclass and those in its fields, by the names that lead to them."""
    yield path, value
    for field in dataclasses.fields(value):
        if is_table(own := getattr(value, field.name)):
            yield from tables(f"{path}.{field.name}" if path else field.name, own)


def said(main: Callable[[list[str]], Any], words: list[str]) -> str:
    """What a program's --help prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return out.getvalue()


def block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"


if __name__ == "__main__":
    os.environ.update(COLUMNS="100", NO_COLOR="1")
    main(Path(sys.argv[1]))
