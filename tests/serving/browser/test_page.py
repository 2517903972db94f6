"""The page at `/` in a real browser: headless Chromium, driven by Playwright (make page-check)."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_model

sync_api = pytest.importorskip("playwright.sync_api", reason="for make page-check")
uvicorn = pytest.importorskip("uvicorn", reason="for make page-check")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
if CHROMIUM is None:
    reason = "no chromium is installed; on Debian: apt-get install chromium"
    pytest.skip(reason, allow_module_level=True)

from tests.serving.browser import stand_in  # noqa: E402

expect = sync_api.expect
QUESTION = "What is the dog doing?"
PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    # Without its sandbox, which a container's root cannot make: it reads nothing but this page.
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[stand_in.StandIn]:
    with stand_in.StandIn() as server:
        yield server


@pytest.fixture
def server(shared) -> stand_in.StandIn:
    for kept in (shared.asked, shared.ended, shared.known):
        kept.clear()
    return shared


@pytest.fixture
def page(server, chromium) -> Iterator[Any]:
    yield from opened(chromium, server.url)


def opened(chromium: Any, url: str, allowed: str = "\0", **given: Any) -> Iterator[Any]:
    """The page, ready; whatever the console says that holds no `allowed` fails the test."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800}, **given)
    said: list[str] = []
    page = context.new_page()
    page.set_default_timeout(20_000)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(url)
    yield page
    context.close()
    assert [line for line in said if allowed not in line] == []


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return tiny_model.write_picture(tmp_path / "dog.png", 3)


def ask(page: Any, question: str) -> None:
    page.get_by_label("Your question").fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()


def ask_about(page: Any, picture: Path, question: str = QUESTION) -> None:
    page.locator("#file").set_input_files(picture)
    ask(page, question)
    expect(answer(page)).to_have_text(stand_in.ANSWER)


def answer(page: Any) -> Any:
    return page.locator(".said .text").last


def note(page: Any) -> Any:
    return page.locator(".said .note").last


# Headless Chromium has no desktop to drag from: the events are those that a drop makes.
DROP = """async ([url, name]) => {
    const blob = await (await fetch(url)).blob();
    let shown;
    const given = new DataTransfer();
    given.items.add(new File([blob], name, {type: blob.type}));
    for (const kind of ["dragenter", "dragover", "drop"]) {
        const event = new DragEvent(kind, {dataTransfer: given, bubbles: true, cancelable: true});
        document.querySelector("#talk").dispatchEvent(event);
        if (kind === "dragover") shown = getComputedStyle(document.querySelector("#drop")).display;
    }
    return shown;
}"""


def test_a_dropped_picture_is_sent_and_the_answer_streams(page, server):
    assert page.evaluate(DROP, ["page/icon.svg", "drawing.svg"]) == "grid"
    expect(page.locator("#chip")).to_contain_text("drawing.svg")
    expect(page.locator("#drop")).to_be_hidden()
    ask(page, "slow")
    expect(answer(page)).to_have_text("The small ")  # while more is to come
    expect(answer(page)).to_have_text(stand_in.ANSWER)
    assert page.locator(".said b").count() == 0  # what looks like markup is text
    (body,) = server.asked
    part, text = body["messages"][0]["content"]
    assert part["image_url"]["url"].startswith("data:image/svg+xml;base64,")
    assert text == {"type": "text", "text": "slow"}
    assert body["stream"] and body["include_metrics"] and body["stream_options"]["include_usage"]


def test_a_pasted_picture_is_attached(page):
    page.evaluate("""() => {
        const given = new DataTransfer();
        given.items.add(new File(["x"], "pasted.png", {type: "image/png"}));
        window.dispatchEvent(new ClipboardEvent("paste", {clipboardData: given}));
    }""")
    expect(page.locator("#chip")).to_contain_text("pasted.png")
    page.get_by_role("button", name="Remove the file").click()
    expect(page.locator("#chip")).to_be_hidden()


def test_a_film_goes_as_one(page, server, tmp_path):
    film = tiny_model.write_video(tmp_path / "walk.mp4", 2)
    page.locator("#file").set_input_files(film)
    ask(page, "what happens?")
    expect(answer(page)).to_have_text(stand_in.ANSWER)
    (part, _) = server.asked[0]["messages"][0]["content"]
    assert part["video_url"]["url"].startswith("data:video/mp4;base64,")
    expect(page.get_by_role("heading", name="The video")).to_be_visible()


def test_a_follow_up_sends_the_pictures_name_and_is_answered_from_memory(page, server, picture):
    ask_about(page, picture)
    expect(note(page)).to_have_text("First token after 48 ms")
    ask(page, "And where?")
    expect(note(page)).to_have_text("Answered from memory: 6.3 ms")
    first, second = server.asked
    sent = first["messages"][0]["content"][0]
    again = second["messages"][0]["content"][0]
    assert again == {"type": "image_url", "image_url": None, "uuid": sent["uuid"]}
    assert second["messages"][1] == {"role": "assistant", "content": stand_in.ANSWER + " "}
    assert second["messages"][2]["content"] == [{"type": "text", "text": "And where?"}]
    expect(page.locator("#own")).to_contain_text("46, 41 from memory")


def test_a_picture_that_the_server_has_forgotten_is_sent_again(server, chromium, picture):
    for page in opened(chromium, server.url, allowed="404"):
        ask_about(page, picture)
        server.known.clear()
        ask(page, "And where?")
        expect(page.locator(".said .note")).to_have_text(["First token after 48 ms"] * 2)
        _, by_name, whole = (body["messages"][0]["content"][0] for body in server.asked)
        assert by_name["image_url"] is None and whole["image_url"]["url"].startswith("data:")


def test_the_heat_map_can_be_put_on_and_off(page, server, picture):
    ask_about(page, picture)
    toggle = page.get_by_role("button", name="Heat map")
    toggle.click()
    expect(toggle).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#stage canvas")).to_be_visible()
    expect(page.locator("#seen-note")).to_contain_text("The strongest of 16 patches has")
    # Something is drawn, and it is not the same everywhere.
    colours = page.evaluate("""() => {
        const canvas = document.querySelector("#stage canvas");
        const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return new Set(new Uint32Array(data.buffer)).size;
    }""")
    assert colours > 100
    toggle.click()
    expect(page.locator("#stage img")).to_be_visible()
    expect(page.locator("#stage canvas")).to_have_count(0)


def test_llava_1_5_is_measured_for_the_question(page, picture):
    ask_about(page, picture)
    page.get_by_role("button", name="Measure it for this question").click()
    rows = page.locator("#comparison tbody tr")
    expect(rows.first).to_be_visible(timeout=60_000)
    told = [row.split() for row in rows.all_inner_texts()]
    assert told[0][-2:] == ["1", "16"]  # tokens of the image
    assert int(told[1][-1]) - int(told[1][-2]) == 15  # positions
    for row in (told[2], told[4], told[5]):
        assert float(row[-4]) >= 0 and float(row[-2]) >= 0 and row[-1] == row[-3] == "ms"
    expect(page.locator("#beside-note")).to_contain_text("not trained for that")


def test_text_alone_has_nothing_to_compare(page):
    ask(page, "who are you?")
    expect(answer(page)).to_have_text(stand_in.ANSWER)
    expect(page.locator("#own")).to_contain_text("Positions read")
    expect(page.locator("#beside")).to_be_hidden()
    expect(page.locator("#seen")).to_be_hidden()


def test_an_answer_can_be_stopped(page, server):
    ask(page, "endless")
    expect(answer(page)).to_contain_text("sleeps")
    page.get_by_role("button", name="Stop").click()
    expect(note(page)).to_have_text("Stopped")
    expect(page.get_by_role("button", name="Ask", exact=True)).to_be_visible()
    for _ in range(100):  # the server notices at its next word
        if server.ended:
            break
        page.wait_for_timeout(50)
    assert server.ended == ["left"]
    ask(page, "who are you?")  # what was said stays in the conversation
    expect(answer(page)).to_have_text(stand_in.ANSWER)
    assert server.asked[1]["messages"][1]["content"].startswith("The small")


@pytest.mark.parametrize(
    ("question", "sentence"),
    [
        ("refuse", "the context is full: 300 positions, the model has 256"),
        ("break", "the engine has stopped"),
        ("tear", "The connection was lost before the answer was complete."),
    ],
)
def test_an_error_is_told_and_the_question_comes_back(
    server, chromium, picture, question, sentence
):
    for page in opened(chromium, server.url, allowed="400"):
        page.locator("#file").set_input_files(picture)
        ask(page, question)
        expect(page.locator(".failed")).to_have_text(sentence)
        expect(page.get_by_label("Your question")).to_have_value(question)
        expect(page.locator("#chip")).to_contain_text("dog.png")
        ask(page, QUESTION)
        expect(answer(page)).to_have_text(stand_in.ANSWER)
        expect(page.locator(".failed")).to_have_count(0)
        assert len(server.asked[1]["messages"]) == 1  # what had no answer is not asked again


def test_what_is_neither_picture_nor_film_and_what_is_too_large_is_told(page, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    page.locator("#file").set_input_files(tmp_path / "notes.txt")
    expect(page.locator("#problem")).to_have_text("notes.txt is neither an image nor a video.")
    (tmp_path / "large.png").write_bytes(bytes(2**20))
    expect(page.locator("#connection")).to_have_text("Ready")
    page.locator("#file").set_input_files(tmp_path / "large.png")
    expect(page.locator("#problem")).to_contain_text("large.png has 1.0 MB; the server takes")


def test_a_server_that_is_not_there_is_told_and_found_again(chromium):
    with stand_in.StandIn() as first:
        tabs = opened(chromium, first.url, allowed="ERR_CONNECTION_REFUSED")
        page = next(tabs)
        expect(page.locator("#connection")).to_have_text("Ready")
    ask(page, QUESTION)
    expect(page.locator("#connection")).to_have_text("Not connected")
    expect(page.locator(".failed")).to_contain_text("cannot be reached")
    with stand_in.StandIn(port=first.port):
        expect(page.locator("#connection")).to_have_text("Ready")
        list(tabs)


def test_a_key_is_asked_for_and_kept_in_the_tab(chromium):
    with stand_in.StandIn(key="secret") as server:
        for page in opened(chromium, server.url, allowed="401"):
            field = page.get_by_label("API key")
            field.fill("wrong")
            page.keyboard.press("Enter")
            expect(page.locator("#key-problem")).to_have_text("give a key that this server knows")
            field.fill("secret")
            page.keyboard.press("Enter")
            expect(page.locator("#model")).to_have_text("llava-mini")
            page.reload()
            ask(page, QUESTION)
            expect(answer(page)).to_have_text(stand_in.ANSWER)


def test_all_of_it_works_by_keyboard(page, picture):
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the question")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.type("first line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Image or video")).to_be_focused()
    with page.expect_file_chooser() as chooser:
        page.wait_for_timeout(200)  # until the browser knows that no window is to open
        page.keyboard.press("Enter")
    chooser.value.set_files(picture)
    expect(page.get_by_label("Your question")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".asked .text")).to_have_text("first line\nsecond")
    expect(note(page)).to_have_text("First token after 48 ms")
    for name in ("Heat map", "Measure it for this question"):
        button = page.get_by_role("button", name=name)
        for _ in range(20):
            page.keyboard.press("Tab")
            if button.evaluate("node => node === document.activeElement"):
                break
        expect(button).to_be_focused()
        page.keyboard.press("Enter")
        expect(button).to_be_enabled(timeout=60_000)
        expect(button).to_be_focused()
    expect(page.locator("#comparison")).to_be_visible()
    page.get_by_label("Your question").focus()
    page.keyboard.type("endless")
    page.keyboard.press("Enter")
    expect(answer(page)).to_contain_text("sleeps")
    page.keyboard.press("Escape")
    expect(note(page)).to_have_text("Stopped")


def test_a_new_conversation_forgets_everything(page, server, picture):
    ask_about(page, picture)
    page.get_by_role("button", name="New conversation").click()
    expect(page.get_by_role("heading", name="Ask about an image or a video")).to_be_visible()
    expect(page.locator("#figures")).to_be_hidden()
    ask(page, "who are you?")
    expect(answer(page)).to_have_text(stand_in.ANSWER)
    assert len(server.asked[1]["messages"]) == 1


def test_a_phone_needs_no_sideways_scrolling(server, chromium, picture):
    for page in opened(chromium, server.url):
        page.set_viewport_size(PHONE)
        ask_about(page, picture, "w" * 200)
        page.get_by_role("button", name="Heat map").click()
        page.get_by_role("button", name="Measure it for this question").click()
        expect(page.locator("#comparison")).to_be_visible(timeout=60_000)
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_in_dark(server, chromium, picture, scheme):
    """WCAG's contrast of 4.5 to 1, of every text that is shown, against what is behind it."""
    for page in opened(chromium, server.url, color_scheme=scheme):
        ask_about(page, picture)
        low = [found for found in page.evaluate(CONTRASTS) if found[1] < 4.5]
        assert json.dumps(low) == "[]"
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(ground[4:].split(",")[0]) < 128) == (scheme == "dark")


CONTRASTS = """() => {
    const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map((x) => x / 255)
        .map((x) => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
        .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
    const ground = (node) => {
        const found = numbers(getComputedStyle(node).backgroundColor);
        return found[3] === 0 && node.parentElement ? ground(node.parentElement) : found;
    };
    const says = (node) => [...node.childNodes].some((c) => c.nodeType === 3 && c.data.trim());
    const all = [...document.body.querySelectorAll("*")];
    const shown = all.filter((node) => node.checkVisibility() && says(node));
    return shown.map((node) => {
        const [a, b] = [numbers(getComputedStyle(node).color), ground(node)].map(light);
        return [node.textContent, (Math.max(a, b) + .05) / (Math.min(a, b) + .05)];
    });
}"""
