"""Around all routes: keys, request ids, counts of answers, a line of the log, and the last word.

ASGI request --Guard--> key? --> routes --> X-Request-Id, http_requests_total, log line
                '-- whatever was raised: an error in the one shape, the traceback in the log
"""

import logging
import re
import time
import uuid
from collections.abc import Collection
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_mini_jax.serving import errors, keys
from llava_mini_jax.serving.errors import ApiError
from llava_mini_jax.serving.service import Service
from llava_mini_jax.serving.stream import dumps

LOG = logging.getLogger(__name__)
METHODS = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH")
_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
_QUIET = ("/health", "/ready", "/metrics")  # asked every few seconds


class Guard:
    """`open_paths` need no key; those of the web page are among them."""

    def __init__(self, app: ASGIApp, service: Service, open_paths: Collection[str]):
        self._app, self._service, self._open = app, service, frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, headers = time.perf_counter(), Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        status = 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = MutableHeaders(scope=message)
                own["x-request-id"] = request_id
                own["x-content-type-options"] = "nosniff"
                if self._service.closed:
                    own["connection"] = "close"
            await send(message)

        try:
            scope["tenant"] = self._tenant(scope, headers)
            await self._app(scope, receive, sent)
        except ClientDisconnect:
            pass  # nobody is left to be told
        except Exception as error:
            if errors.of(error).status == 500:
                LOG.exception("request %s failed", request_id)
            if not status:
                await response(error)(scope, receive, sent)
        finally:
            if "place" in scope:
                scope["place"].leave()
            self._note(scope, status, time.perf_counter() - began, request_id)

    def _tenant(self, scope: Scope, headers: Headers) -> str:
        if scope["path"] in self._open or scope["method"] == "OPTIONS":
            return ""
        return keys.tenant(headers.get("authorization"), self._service.options.keys)

    def _note(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        # Its template, not its path: labels must be few, and a path may hold anything.
        handler = getattr(scope.get("route"), "path", None) or scope.get("handler", "none")
        method = scope["method"] if scope["method"] in METHODS else "OTHER"
        status = status or 499  # the client left before there was an answer
        self._service.metrics.answered_http(handler, method, status, seconds)
        if handler not in _QUIET:
            LOG.info("%s %s %d %.3f s %s", method, handler, status, seconds, request_id)


def response(error: Exception) -> Response:
    """An exception as a client is told of it."""
    said, headers = errors.of(_of_http(error)), {}
    if said.retry_after is not None:
        headers["retry-after"] = str(said.retry_after)
    if said.status == 401:
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, HTTPException):
        headers |= error.headers or {}  # Allow, of 405
    return Response(dumps(said.body()), said.status, headers, "application/json")


def _of_http(error: Exception) -> Exception:
    if not isinstance(error, HTTPException):
        return error
    told: dict[int, str] = {
        404: "there is nothing at this path; chats are asked at /v1/chat/completions",
        405: "this path does not allow this method; the header Allow names the allowed ones",
    }
    status = error.status_code
    if status in told:
        return ApiError(status, told[status])
    return ApiError(status if status in errors.TYPES else 400, str(error.detail))


async def on_error(request: Request, error: Exception) -> Any:
    return response(error)
