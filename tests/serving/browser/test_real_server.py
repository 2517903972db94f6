"""The page in front of `llava-mini serve` itself, with a tiny model of random weights."""

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests import tiny_model
from tests.conftest import ROOT

sync_api = pytest.importorskip("playwright.sync_api", reason="for make page-check")
test_page = pytest.importorskip("tests.serving.browser.test_page")

expect, chromium, picture = sync_api.expect, test_page.chromium, test_page.picture
KEY = "sk-of-a-reader"


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(KEY)
    words = ["serve", str(tiny_model.folder("paper")), "--port", "0", "--api-key-file", str(keys)]
    server = subprocess.Popen(
        [sys.executable, "-m", "llava_mini_jax", *words],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr is not None
    try:
        for line in server.stderr:
            if found := re.search(r"listening on (http://\S+)", line):
                yield found[1]
                break
        else:
            pytest.fail("the server has ended")
    finally:
        server.terminate()
        told = server.stderr.read()
        assert server.wait() == 0 and "Traceback" not in told, told


@pytest.mark.slow
def test_a_picture_a_question_a_follow_up_the_map_and_the_comparison(url, chromium, picture):
    def answered(page: Any, number: int, question: str) -> str:
        test_page.ask(page, question)
        note = page.locator(".said .note").nth(number)
        expect(note).to_contain_text(" ms", timeout=60_000)
        assert page.locator(".said .text").nth(number).inner_text()
        return note.inner_text()

    for page in test_page.opened(chromium, url, allowed="401"):
        expect(page.locator("#connection")).to_have_text("Ready", timeout=120_000)
        page.get_by_label("API key").fill(KEY)
        page.keyboard.press("Enter")
        page.locator("#file").set_input_files(picture)
        assert "First token after" in answered(page, 0, "which digit is in row 1 column 2?")
        assert "Answered from memory" in answered(page, 1, "and in row 2?")
        expect(page.locator("#own")).to_contain_text("Visionfrom memory")
        page.get_by_role("button", name="Heat map").click()
        expect(page.locator("#seen-note")).to_contain_text("The strongest of 16 patches")
        page.get_by_role("button", name="Measure it for this question").click()
        expect(page.locator("#comparison")).to_be_visible(timeout=120_000)
        expect(page.locator("#comparison")).to_contain_text("LLaVA-1.5")
