"""The page's own endpoints, without a browser (browser/test_page.py has one)."""

import base64
import dataclasses
import io
import re
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import llava_mini_jax
from llava_mini_jax import compilation
from llava_mini_jax.analysis import compression
from llava_mini_jax.inference.answer import Settings
from llava_mini_jax.inference.ticket import Medium, Request
from llava_mini_jax.serving import comparison, page
from llava_mini_jax.serving.errors import ApiError
from tests import tiny, tiny_model

testclient = pytest.importorskip("starlette.testclient", reason="for the extra serve")
Starlette = pytest.importorskip("starlette.applications").Starlette

fast_compilation = tiny.fast_compilation
PICTURES = [tiny_model.picture(seed) for seed in range(12)]


@pytest.fixture(scope="module")
def thread():
    with ThreadPoolExecutor(1) as pool:
        yield pool


def engine(thread: Any, dialect: str = "paper") -> Any:
    """What the page asks of a worker, with a thread of its own."""
    model = llava_mini_jax.load(tiny_model.folder(dialect))
    return SimpleNamespace(model=model, between=thread.submit)


def request(worker: Any, *counts: int, tokens: int = 4) -> Request:
    """A question about media of so many frames each."""
    pixels = worker.model.read_pictures(PICTURES[: sum(counts)], None).pixels
    none = worker.model.read_pictures(None, None)
    pictures = dataclasses.replace(none, pixels=pixels, frames=counts)
    example = worker.model.request("<image>" * len(counts) + "which digit is it?", pictures)
    example = dataclasses.replace(example, pixels=none.pixels)
    media, first = [], 0
    for count in counts:
        shown, first = pixels[first : first + count], first + count
        media.append(Medium(b"", count, lambda shown=shown: iter(shown)))
    return Request(example, media, Settings(max_new_tokens=tokens))


def client(worker: Any, asked: Request | None = None) -> Any:
    async def read(http: Any) -> Request:
        assert asked is not None and (await http.json()) == {"messages": []}
        return asked

    routes = page.routes(worker, read, name="tiny", body_bytes=7)
    return testclient.TestClient(Starlette(routes=routes), raise_server_exceptions=True)


def test_every_file_of_the_page_is_served_with_a_policy_and_needs_no_key(thread):
    http = client(engine(thread))
    for path in page.open_paths():
        found = http.get(path)
        assert found.status_code == 200 and len(found.content) > 100, path
        assert found.headers["content-security-policy"].startswith("default-src 'self';")
        assert found.headers["x-content-type-options"] == "nosniff"
        assert found.headers["referrer-policy"] == "no-referrer"
    assert http.get("/page/style.css").headers["content-type"] == "text/css; charset=utf-8"
    assert {"/", "/page/index.html", "/page/main.js"} <= set(page.open_paths())
    assert http.get("/page/%2e%2e%2fpage.py").status_code == 404
    with pytest.raises(ApiError) as error:
        http.get("/page/page.py")
    assert error.value.status == 404


def test_the_page_names_no_other_host_and_writes_no_markup():
    for name, content in page._files().items():
        text = content.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z]+\.[a-z]", text), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
        assert not re.search(r"<[^>]+ (on\w+|style)=", text), name


def test_about_says_what_the_page_must_know(thread):
    about = client(engine(thread)).get("/about").json()
    assert about == dict(model="tiny", body_bytes=7, tokens=1, patches=16, look=True, compare=True)
    about = client(engine(thread, "llava-1.5")).get("/about").json()
    assert (about["tokens"], about["look"], about["compare"]) == (16, False, False)


def test_the_heat_map_is_the_compressors_attention(thread):
    worker = engine(thread)
    asked = request(worker, 1)
    found = client(worker, asked).post("/look", json={"messages": []}).json()
    (frame,) = found["frames"]
    (pixels,) = asked.media[0].read()
    model = worker.model
    (map_QYX,) = compression.maps(model.params, pixels[None], model.bundle.model)
    np.testing.assert_allclose(frame["grid"], map_QYX.mean(axis=0), atol=1e-6)
    assert (found["count"], frame["frame"], found["note"]) == (1, 0, None)
    head, letters = frame["picture"].split(",")
    assert head == "data:image/jpeg;base64"
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(letters))))
    assert shown.shape == pixels[0].shape
    assert np.abs(shown.astype(int) - pixels[0]).mean() < 20  # JPEG's loss, not another image


def test_of_a_film_frames_from_its_beginning_to_its_end_are_looked_at(thread):
    found = page.looked_at(worker := engine(thread), request(worker, 12).media)
    assert found["count"] == 12
    assert [frame["frame"] for frame in found["frames"]] == [0, 2, 3, 5, 6, 8, 9, 11]


def test_models_without_queries_and_requests_without_pictures_are_refused(thread):
    worker = engine(thread, "llava-1.5")
    with pytest.raises(ApiError, match="no queries") as error:
        page.looked_at(worker, request(worker, 1).media)
    assert error.value.status == 400
    with pytest.raises(ApiError, match="shows no image"):
        page.looked_at(worker, [])


def test_both_sides_are_measured_on_the_engines_thread(thread):
    worker = engine(thread)
    runs = []

    def between(work: Any) -> Any:
        runs.append(work)
        return thread.submit(work)

    worker.between = between
    found = comparison.compare(worker, request(worker, 1, tokens=100))
    assert (found["tokens"], found["repeats"]) == (comparison.MOST_TOKENS, comparison.REPEATS)
    mini, baseline = found["mini"], found["baseline"]
    assert (mini["image_tokens"], baseline["image_tokens"]) == (1, 16)
    assert baseline["positions"] - mini["positions"] == 15
    assert mini["prefusion_ms"] > 0 and baseline["prefusion_ms"] is None
    for side in (mini, baseline):
        assert all(side[name] > 0 for name in ("vision_ms", "first_token_ms", "token_ms"))
    # Two kinds of runs of two sides, in turns: each is a step of its own between others.
    first = [runs.index(run) for run in runs]
    assert first == [0, 1, 2, 3] * (comparison.REPEATS + 2)


def test_what_cannot_be_compared_is_told(thread):
    worker = engine(thread)
    for counts, told in (
        ((), "shows no image"),
        ((12,), "would need 192 positions for 12 frames of 16 patches"),
    ):
        with pytest.raises(ApiError, match=told) as error:
            comparison.compare(worker, request(worker, *counts))
        assert error.value.status == 400
    older = engine(thread, "llava-1.5")
    with pytest.raises(ApiError, match="is a LLaVA-1"):
        comparison.compare(older, request(older, 1))
    with comparison._alone, pytest.raises(ApiError) as error:
        comparison.compare(worker, request(worker, 1))
    assert (error.value.status, error.value.retry_after) == (429, comparison.BUSY_SECONDS)


def test_nothing_is_compiled_on_the_engines_thread(thread):
    """Others would wait for it."""
    worker = engine(thread, "release")
    compilation.compiled()
    grown: list[int] = []

    def between(work: Any) -> Any:
        def counted() -> Any:
            before = compilation.compiled()
            found = work()
            grown.append(compilation.compiled() - before)
            return found

        return thread.submit(counted)

    worker.between = between
    asked = request(worker, 3)
    page.looked_at(worker, asked.media)
    comparison.compare(worker, asked)
    assert sum(grown) == 0 and len(grown) == 3 + 4 * (comparison.REPEATS + 2)


def test_an_engine_that_has_ended_is_told(thread):
    worker = engine(thread)
    cancelled: Any = Future()
    cancelled.cancel()
    worker.between = lambda work: cancelled
    with pytest.raises(ApiError, match="stopped working") as error:
        page.looked_at(worker, request(worker, 1).media)
    assert error.value.status == 503
