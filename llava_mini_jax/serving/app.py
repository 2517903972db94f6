"""The application: routes, and what stands around them.

CORS, where origins are allowed --> Guard (keys, ids, counts, errors) --> routes --> Service
"""

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from llava_mini_jax.errors import InputError
from llava_mini_jax.serving.errors import ApiError
from llava_mini_jax.serving.guard import Guard, on_error
from llava_mini_jax.serving.routes import routes
from llava_mini_jax.serving.service import Service

OPEN = ("/health", "/ready")


def application(
    service: Service, page: Sequence[BaseRoute] = (), open_paths: Sequence[str] = ()
) -> ASGIApp:
    """An ASGI application; `page` are the routes of the web page, `open_paths` need no key."""
    inner = Starlette(
        routes=[*routes(service), *page],
        exception_handlers=dict.fromkeys(
            (ApiError, InputError, HTTPException, Exception), on_error
        ),
    )
    inner.router.redirect_slashes = False  # a path with a slash behind it is another one
    metrics = ("/metrics",) if service.options.open_metrics else ()
    guarded = Guard(inner, service, (*OPEN, *metrics, *open_paths))
    if not service.options.origins:
        return guarded
    return CORSMiddleware(
        guarded,
        allow_origins=service.options.origins,
        allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type", "x-request-id"],
        expose_headers=["x-request-id", "retry-after"],
    )
