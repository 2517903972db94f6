"""The page in front of `llava-mini serve` itself, with a tiny model of random weights."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests import tiny_model
from tests.serving.process import serving

sync_api = pytest.importorskip("playwright.sync_api", reason="for make page-check")
test_page = pytest.importorskip("tests.serving.browser.test_page")

expect, chromium, picture = sync_api.expect, test_page.chromium, test_page.picture
KEY = "sk-of-a-reader"
TOKENS = 12  # of an answer: random weights never end one


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(KEY)
    folder = tiny_model.folder("paper")
    with serving(folder, "--slots", "2", "--api-key-file", str(keys)) as found:
        yield found


def shorter(route: Any) -> None:
    body = route.request.post_data_json | {"max_completion_tokens": TOKENS}
    route.continue_(post_data=json.dumps(body))


@pytest.mark.slow
def test_a_picture_a_question_a_follow_up_the_map_and_the_comparison(url, chromium, picture):
    for page in test_page.opened(chromium, url, allowed="401"):
        page.get_by_label("API key").fill(KEY)
        page.keyboard.press("Enter")
        page.route("**/v1/chat/completions", shorter)
        page.locator("#file").set_input_files(picture)
        test_page.ask(page, "which digit is in row 1 column 2?")
        expect(test_page.note(page)).to_contain_text("First token after", timeout=60_000)
        test_page.ask(page, "and in row 2?")
        expect(test_page.note(page)).to_contain_text("Answered from memory", timeout=60_000)
        expect(page.locator(".said .text").first).not_to_be_empty()
        expect(page.locator("#own")).to_contain_text("Visionfrom memory")
        page.get_by_role("button", name="Heat map").click()
        expect(page.locator("#seen-note")).to_contain_text("The strongest of 16 patches")
        page.get_by_role("button", name="Measure it for this question").click()
        expect(page.locator("#comparison")).to_be_visible(timeout=120_000)
        expect(page.locator("#comparison")).to_contain_text("LLaVA-1.5")
