"""Bodies from the network: counted while they are read, in limited time, and parsed on a thread.

headers: type, length --> chunks, counted --> bytes --thread--> JSON object --read--> fields
"""

import asyncio
from typing import TypeVar

from starlette.requests import Request

from llava_mini_jax.serving.body import parse
from llava_mini_jax.serving.errors import ApiError
from llava_mini_jax.serving.fields import Fields, read
from llava_mini_jax.serving.limits import Limits
from llava_mini_jax.serving.service import Service

F = TypeVar("F", bound=Fields)


async def fields_of(request: Request, kind: type[F], service: Service) -> F:
    """ApiError for a body that is too large, too slow, or not what `kind` says."""
    kind_given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind_given != "application/json":
        raise ApiError(400, "the body is not declared as JSON; send Content-Type: application/json")
    limits = service.options.limits
    body = await _body(request, limits.body_bytes, service.options.body_timeout)
    return await service.quickly(_read, body, kind, limits)


def _read(body: bytes, kind: type[F], limits: Limits) -> F:
    return read(kind, parse(body), limits)


async def _body(request: Request, most: int, seconds: float) -> bytes:
    too_large = ApiError(413, f"the body is larger than {most} bytes; send less or smaller media")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared[:19]) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise too_large
    except TimeoutError:
        late = f"the body has not arrived within {seconds:g} s; send it again"
        raise ApiError(408, late) from None
    return bytes(body)
