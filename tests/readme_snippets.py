"""Runs the examples of README.md and docs/*.md, so that what they say stays true.

    README.md, docs/*.md --find--> ```bash and ```python blocks --run--> one line each
                             |
                             '-- <!-- not run: reason --> on the line above: counted, not run

Every block runs on its own, from the repository root, with this Python's programs first on PATH.
The Python of a page that begins with <!-- run: one after another --> is one program
(docs/tutorial.md), which takes minutes and is run only by its name.
    python tests/readme_snippets.py [FILE ...]
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TIME_LIMIT_SECONDS = 600
TOGETHER = "<!-- run: one after another -->\n"
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+?) -->\n)?"
    r"```(?P<language>bash|python)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Snippet(NamedTuple):
    place: str  # file and line of the opening fence
    language: str  # bash or python
    code: str
    reason: str | None  # why it is not run


def find_snippets(text: str, name: str) -> list[Snippet]:
    """All bash and python blocks of a Markdown text, in order; or what is one program, as one."""
    found = [
        Snippet(
            place=f"{name}:{text.count(chr(10), 0, match.start('language')) + 1}",
            language=match["language"],
            code=match["code"],
            reason=match["reason"],
        )
        for match in BLOCK.finditer(text)
    ]
    if not text.startswith(TOGETHER):
        return found
    cells = [one for one in found if one.language == "python" and not one.reason]
    return [Snippet(f"{name}: {len(cells)} blocks", "python", "".join(c.code for c in cells), None)]


def run_snippet(snippet: Snippet) -> tuple[bool, str]:
    """Whether it ended well, and everything that it printed."""
    program = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
    programs = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    try:
        done = subprocess.run(
            [*program[snippet.language], snippet.code],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIME_LIMIT_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        return False, f"{error.stdout or ''}\nstopped after {TIME_LIMIT_SECONDS} s"
    return done.returncode == 0, done.stdout


def main(names: list[str]) -> int:
    files = [Path(name).resolve() for name in names]
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    files = files or [page for page in pages if not page.read_text().startswith(TOGETHER)]
    counts = {"run": 0, "not run": 0, "failed": 0}
    for file in files:
        for snippet in find_snippets(file.read_text(encoding="utf-8"), os.path.relpath(file, ROOT)):
            if snippet.reason:
                counts["not run"] += 1
                print(f"skip  {snippet.place}: {snippet.reason}")
                continue
            began = time.monotonic()
            good, output = run_snippet(snippet)
            counts["run" if good else "failed"] += 1
            print(f"{'ok' if good else 'FAIL':5} {snippet.place}: {time.monotonic() - began:.1f} s")
            if not good:
                print(snippet.code, "-" * 40, output, sep="\n")
    print(f"{counts['run']} snippets run, {counts['failed']} failed, {counts['not run']} not run")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
