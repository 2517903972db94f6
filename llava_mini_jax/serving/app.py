"""The application: routes, and what stands around them.

CORS, where origins are allowed --> Guard (keys, ids, counts, errors) --> routes --> Service
"""

from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from llava_mini_jax.errors import InputError
from llava_mini_jax.serving import page
from llava_mini_jax.serving.errors import ApiError
from llava_mini_jax.serving.guard import Guard, on_error
from llava_mini_jax.serving.routes import engine_request, routes
from llava_mini_jax.serving.service import Service

OPEN = ("/health", "/ready")


def application(service: Service) -> ASGIApp:
    options = service.options
    shown = page.routes(
        service.worker,
        partial(engine_request, service),
        name=options.names[0],
        body_bytes=options.limits.body_bytes,
    )
    inner = Starlette(
        routes=[*routes(service), *shown],
        exception_handlers=dict.fromkeys(
            (ApiError, InputError, HTTPException, Exception), on_error
        ),
    )
    inner.router.redirect_slashes = False  # a path with a slash behind it is another one
    metrics = ("/metrics",) if options.open_metrics else ()
    guarded = Guard(inner, service, (*OPEN, *metrics, *page.open_paths()))
    if not options.origins:
        return guarded
    return CORSMiddleware(
        guarded,
        allow_origins=options.origins,
        allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type", "x-request-id"],
        expose_headers=["x-request-id", "retry-after"],
    )
