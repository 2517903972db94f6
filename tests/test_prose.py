"""README and docs as a reader meets them: links lead somewhere, words are plain."""

import ast
import re
from pathlib import Path

import pytest

from tests.readme_snippets import find_snippets

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
SOURCE = re.compile(r'<(?:img|source) [^>]*?src(?:set)?="([^"]+)"')
# What a native engineer would not write, and what to write instead.
WORDS = {
    "anew": "again, from scratch",
    "begun": "started",
    "besides": "also, as well",
    "blinded": "masked",
    "for ever": "forever",
    "hitherto": "so far",
    "in company": "together, in a batch",
    "in silence": "silently",
    "in turns": "alternately",
    "is said": "says",
    "likewise": "the same, also",
    "of old": "earlier",
    "of one's own": "your own",
    "of others": "third-party, other people's",
    "of theirs": "their",
    "so many": "N, that many",
    "strangers": "untrusted input",
    "thereby": "so",
    "to speak of": "negligible",
    "told": "said, reported, shown",
    "whoever": "anyone who",
}
# Of messages also: "is no folder". "There is no folder" is English, and so is "is no longer".
IS_NO = re.compile(r"(?i)(?<!there )\bis no (?!longer\b)")

# In messages a thing has one name: these are images and videos.
OTHER_NAMES = re.compile(r"(?i)\b(pictures?|films?)\b")


def prose(text: str) -> str:
    """A page without its code."""
    return re.sub(r"`[^`]*`", "", re.sub(r"(?ms)^```.*?^```", "", text))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"(?m)^#{1,6} (.*)$", re.sub(r"(?ms)^```.*?^```", "", text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page: Path) -> list[str]:
    """Links of a page to files and headings that are not there. Other sites are not asked."""
    found = []
    text = prose(page.read_text())
    for target in [*(target for _, _, target in LINK.findall(text)), *SOURCE.findall(text)]:
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_and_pictures_are_described(page: str) -> None:
    text = (ROOT / page).read_text()
    assert broken(ROOT / page) == []
    assert [target for mark, words, target in LINK.findall(text) if mark and len(words) < 5] == []
    tags = re.findall("<img [^>]*>", prose(text))
    assert [tag for tag in tags if not re.search('alt="[^"]{5}', tag)] == []


@pytest.mark.parametrize("page", PAGES)
def test_words_are_plain(page: str) -> None:
    text = prose((ROOT / page).read_text())
    found = {word: WORDS[word] for word in WORDS if re.search(rf"(?i)\b{word}\b", text)}
    assert not found, f"{page}: write instead {found}"


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n[a](page.md#a-page) [b](#nowhere) [c](gone.md)\n`[d](code.md)`\n"
        '<source media="dark" srcset="dark.png"><img src="light.png" alt="a page">\n'
    )
    assert broken(page) == ["#nowhere", "gone.md", "dark.png", "light.png"]


def test_the_tutorial_is_one_program() -> None:
    """A name that a block makes is there in the next one; `make tutorial` runs it."""
    text = (ROOT / "docs" / "tutorial.md").read_text()
    (program,) = find_snippets(text, "docs/tutorial.md")
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", text)
    assert len(blocks) > 5 and program.code == "".join(blocks) and program.reason is None
    compile(program.code, "docs/tutorial.md", "exec")


def test_every_page_is_linked_from_another() -> None:
    linked = set()
    for name in PAGES:
        page = ROOT / name
        for _, _, target in LINK.findall(page.read_text()):
            file = (page.parent / target.partition("#")[0]).resolve()
            if file.is_relative_to(ROOT) and file != page:
                linked.add(file.relative_to(ROOT).as_posix())
    assert set(PAGES) - linked - {"README.md"} == set()


def messages(source: str) -> list[str]:
    """The texts of a module's errors for users, with "{}" for what is put into them."""
    found = []
    for node in ast.walk(ast.parse(source)):
        name = getattr(node, "func", None)
        name = getattr(name, "id", getattr(name, "attr", ""))
        if isinstance(node, ast.Call) and name in ("InputError", "ArgumentTypeError", "ApiError"):
            parts = [part for argument in node.args for part in ast.walk(argument)]
            texts = [p.value for p in parts if isinstance(p, ast.Constant)]
            found.append("{}".join(text for text in texts if isinstance(text, str)))
    return found


def test_errors_are_plain() -> None:
    for source in sorted((ROOT / "llava_mini_jax").rglob("*.py")):
        for said in messages(source.read_text()):
            found = [word for word in WORDS if re.search(rf"(?i)\b{word}\b", said)]
            assert not found and not IS_NO.search(said), f"{source.name}: {said}"
            assert not OTHER_NAMES.search(said), f"{source.name}: {said}"


def test_an_error_that_is_not_plain_is_found() -> None:
    (said,) = messages('raise InputError(f"{folder} is no folder of "\n    "strangers; move it")')
    assert IS_NO.search(said) and re.search(r"\bstrangers\b", said)
    assert OTHER_NAMES.search("the picture a.png") and not OTHER_NAMES.search("pictured")
    assert not IS_NO.search("there is no such file, it is no longer in the folder")


def test_help_is_plain() -> None:
    """The words of commands' help, as the source has them."""
    for source in sorted((ROOT / "llava_mini_jax" / "cli").glob("*.py")):
        said = " ".join(
            re.findall(r'(?:help|SUMMARY|metavar)\s?=\s?f?"([^"]*)"', source.read_text())
        )
        found = [word for word in WORDS if re.search(rf"(?i)\b{word}\b", said)]
        assert not found, f"{source.name}: {found}"
        assert not OTHER_NAMES.search(said), f"{source.name}: {said}"
