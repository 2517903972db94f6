"""make page-picture: docs/page.png, the server's web page after questions about a page of digits.

MODEL --llava-mini serve--> http://127.0.0.1 --Chromium--> questions, heat map --> OUT

CHROMIUM=/usr/bin/chromium python docs/site/page.py MODEL OUT
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright import sync_api

from llava_mini_jax.data.digits.pages import DigitsConfig, DigitsPages
from llava_mini_jax.evaluation.image.digits import SEED, enlarged

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.serving.process import serving

QUESTIONS = ("which digit is in row 2 column 3?", "read row 1.", "which is the largest digit?")
SIZE = {"width": 1120, "height": 780}
DENSITY = 1.5  # pixels of the file for one of the page
OPTIONS = ("--slots", "2", "--served-model-name", "llava-mini-digits")
PATIENCE = 300_000  # milliseconds: what the heat map needs is compiled first


def main(folder: Path, target: Path) -> None:
    pages = DigitsPages(DigitsConfig(split="heldout", kinds=("read",), seed=SEED), 1)
    with tempfile.TemporaryDirectory() as home, serving(folder, *OPTIONS) as url:
        shown = Path(home) / "page.png"
        enlarged(pages[0]["image"]).save(shown)
        with sync_api.sync_playwright() as playwright:
            # Without its sandbox, which a container's root cannot make.
            path = os.environ["CHROMIUM"]
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            page = browser.new_page(viewport=SIZE, device_scale_factor=DENSITY)
            page.set_default_timeout(PATIENCE)
            page.goto(url)
            converse(page, shown)
            page.screenshot(path=target)
            browser.close()
    print(target)


def converse(page: Any, shown: Path) -> None:
    """Asks, and puts the heat map on."""
    notes = page.locator(".said .note")
    page.locator("#file").set_input_files(shown)
    for number, question in enumerate(QUESTIONS):
        page.get_by_label("Your question").fill(question)
        page.get_by_role("button", name="Ask", exact=True).click()
        answered = "Answered from memory" if number else "First token after"
        sync_api.expect(notes.nth(number)).to_contain_text(answered, timeout=PATIENCE)
    page.get_by_role("button", name="Heat map").click()
    sync_api.expect(page.locator("#seen-note")).to_contain_text("The strongest")
    page.locator("h1").click()  # nothing has the focus


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
