"""The page at `/`, and what it shows beside answers.

    GET /, /page/NAME               HTML, a style sheet, modules: the same for everybody
    GET /about                      what the page must know of the model
    POST /look     chat's body  --> frames as the model reads them, attention over their patches
    POST /compare  chat's body  --> tokens and milliseconds, LLaVA-Mini's and LLaVA-1.5's

Images of a request reach the page again as the model reads them: cut and squeezed as they are,
the map lies over the right places.
"""

import base64
import io
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from importlib.resources import files
from typing import Any

import numpy as np
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from llava_mini_jax.analysis import compression
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference.ticket import Medium, Request
from llava_mini_jax.inference.warm_up import WarmUp
from llava_mini_jax.inference.worker import Worker
from llava_mini_jax.models.llava_mini import LlavaMiniConfig
from llava_mini_jax.serving.comparison import comparable, compare, on_engine
from llava_mini_jax.serving.errors import ApiError

TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
HEADERS = {
    # Beyond 'self' images and films by "blob:" alone, which are addresses of files that the page
    # itself was given: it shows what will be sent. No data: addresses, which any markup could hold.
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' blob:; media-src blob:; object-src 'none';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
MOST_FRAMES = 8  # of a film that the heat map is told for

Read = Callable[[HttpRequest], Awaitable[Request]]


def routes(worker: Worker, read: Read, *, name: str, body_bytes: int) -> list[BaseRoute]:
    """The page's routes. `read` makes the engine's request of a body of /v1/chat/completions."""
    shown = _files()

    async def page(request: HttpRequest) -> Response:
        file = request.path_params.get("name", "index.html")
        if file not in shown:
            raise ApiError(404, "there is no such page")
        return Response(shown[file], media_type=TYPES[file.rsplit(".")[-1]], headers=HEADERS)

    async def about(request: HttpRequest) -> Response:
        return JSONResponse(_about(worker) | {"model": name, "body_bytes": body_bytes})

    async def look(request: HttpRequest) -> Response:
        asked = await read(request)
        return JSONResponse(await run_in_threadpool(looked_at, worker, asked.media))

    async def beside(request: HttpRequest) -> Response:
        asked = await read(request)
        return JSONResponse(await run_in_threadpool(compare, worker, asked))

    return [
        Route("/", page),
        Route("/page/{name}", page),
        Route("/about", about),
        Route("/look", look, methods=["POST"]),
        Route("/compare", beside, methods=["POST"]),
    ]


def _files() -> dict[str, bytes]:
    return {
        file.name: file.read_bytes()
        for file in (files("llava_mini_jax.serving") / "page").iterdir()
    }


def open_paths() -> list[str]:
    """Paths that need no key: they are the same for everybody, and ask for the key."""
    return ["/", *(f"/page/{name}" for name in _files())]


def _about(worker: Worker) -> dict[str, Any]:
    cfg, parts = worker.model.bundle.model, worker.model.bundle.images.parts
    return {
        "tokens": cfg.tokens_per_image(parts),
        "patches": cfg.patches_per_image(parts),
        "look": _has_queries(cfg),
        "compare": comparable(cfg),
    }


def _has_queries(cfg: LlavaMiniConfig) -> bool:
    return cfg.compressor.kind in compression.WITH_QUERIES and not cfg.inside_layers


def looked_at(worker: Worker, media: Sequence[Medium]) -> dict[str, Any]:
    """Attention over the patches, the mean over queries, of up to `MOST_FRAMES` frames.

    Each frame's is a step of its own on the engine's thread.
    """
    if not media:
        raise ApiError(400, "the request shows no image; give an image_url or a video_url")
    model, count = worker.model, sum(medium.frames for medium in media)
    chosen = set(np.linspace(0, count - 1, min(count, MOST_FRAMES)).round().astype(int).tolist())
    frames = []
    try:
        for number, parts_JYXC in enumerate(frame for one in media for frame in one.read()):
            if number not in chosen:
                continue
            given = (model.params, parts_JYXC[None], model.bundle.model)
            if not frames:
                # Here, so that nobody's answer stands still while it is compiled.
                WarmUp(partial(_compile, given), always=True).wait()
            work = partial(compression.maps, *given)
            map_YX = on_engine(worker, work)[0].mean(axis=0)
            frames.append(
                {
                    "frame": number,
                    "picture": _data_url(compression.assembled(parts_JYXC)),
                    "grid": map_YX.astype(float).round(6).tolist(),
                }
            )
    except InputError as error:
        raise ApiError(400, str(error)) from error
    return {
        "count": count,
        "frames": frames,
        "note": compression.position_note(model.bundle.model),
    }


def _compile(given: tuple[Any, ...], call: Callable[..., Any]) -> None:
    call(compression.attention, *given)


def _data_url(picture_YXC: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(picture_YXC).save(file, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
