"""What is answered where.

POST /v1/chat/completions, /v1/completions --> fields, prompt --> Reply
GET /v1/models, /health, /ready, /metrics, /version, /load --> at once
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

import llava_mini_jax
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference import ticket
from llava_mini_jax.serving import asking
from llava_mini_jax.serving.errors import ApiError
from llava_mini_jax.serving.fields import ChatFields, CompletionFields
from llava_mini_jax.serving.intake import fields_of
from llava_mini_jax.serving.messages import Conversation, conversation
from llava_mini_jax.serving.metrics import CONTENT_TYPE
from llava_mini_jax.serving.parts import VideoPart
from llava_mini_jax.serving.reply import Reply
from llava_mini_jax.serving.service import AS_FILM, Service
from llava_mini_jax.serving.shapes import ChatShape, CompletionShape
from llava_mini_jax.serving.stream import dumps

Handler = Callable[[Service, Request], Awaitable[Any]]


def routes(service: Service) -> list[BaseRoute]:
    """Paths that are not among them are 404."""
    table: list[tuple[str, str, Handler]] = [
        ("POST", "/v1/chat/completions", _chat),
        ("POST", "/v1/completions", _completion),
        ("GET", "/v1/models", _models),
        ("GET", "/v1/models/{name:path}", _model),
        ("GET", "/health", _health),
        ("GET", "/ready", _ready),
        ("GET", "/metrics", _metrics),
        ("GET", "/version", _version),
        ("GET", "/load", _load),
    ]
    return [
        Route(path, _labelled(path, partial(handler, service)), methods=[method])
        for method, path, handler in table
    ]


def _labelled(path: str, handler: Callable[[Request], Awaitable[Any]]) -> Any:
    async def endpoint(request: Request) -> Any:
        request.scope["handler"] = path  # for the metrics: never the path that was asked for
        return await handler(request)

    return endpoint


# --- Answers --------------------------------------------------------------------------------------


async def _chat(service: Service, request: Request) -> Reply:
    arrived = time.perf_counter()
    service.check_open()
    fields = await fields_of(request, ChatFields, service)
    model = service.worker.model
    name = service.model_name(fields.model)
    asking.chosen_tokens(fields, model.bundle)  # told before anything is read
    asked = await service.quickly(conversation, fields.messages, _as_film(fields))
    fields.messages.clear()  # what is large of them is in `asked`, until it has been read
    service.check_open()  # it may have closed while the body came
    place = service.enter(fields.n)
    shape = ChatShape(name, service.options.fingerprint, model.tokenizer, fields.logprobs)
    prepare = partial(_ask_chat, service, fields, asked, _tenant(request, fields.cache_salt))
    return _reply(service, fields, shape, prepare, place, arrived)


async def _ask_chat(
    service: Service, fields: ChatFields, asked: Conversation, tenant: str
) -> Sequence[ticket.Request]:
    model = service.worker.model
    try:
        tokens = asking.chosen_tokens(fields, model.bundle)
        prompt = await service.quickly(asking.chat_prompt, asked, model, service.context, tokens)
        media = await _media(service, fields, asked, tenant)
        return await service.quickly(
            partial(asking.requests, prompt, media, fields, model),
            *(service.context, service.options.defaults, tenant),
        )
    except InputError as error:
        raise ApiError(400, str(error), param="messages") from error


async def _media(
    service: Service, fields: ChatFields, asked: Conversation, tenant: str
) -> Sequence[ticket.Medium]:
    parts, video = asked.media, asking.video_options(fields)
    if not parts:
        return ()
    if not _as_film(fields):
        return await service.read_media(parts, video, tenant)
    if any(isinstance(part, VideoPart) for part in parts):
        raise ApiError(
            400, f"the model's name ends in {AS_FILM}; send frames as image_url", param="video_url"
        )
    # As many at a time as a request may have images: a film has more, which the context bounds.
    most, media = service.options.limits.images, []
    for start in range(0, len(parts), most):
        media += await service.read_media(parts[start : start + most], video, tenant)
    return asking.joined(media, asked.marks)


def _as_film(fields: ChatFields) -> bool:
    return fields.model.endswith(AS_FILM)


async def engine_request(service: Service, request: Request) -> ticket.Request:
    """What the engine would be asked by a chat's body, for other work on it.

    A place is held until the HTTP request is over: that work counts as an answer's.
    """
    service.check_open()
    fields = await fields_of(request, ChatFields, service)
    service.model_name(fields.model)
    asking.chosen_tokens(fields, service.worker.model.bundle)
    asked = await service.quickly(conversation, fields.messages, _as_film(fields))
    request.scope["place"] = service.enter(1)
    tenant = _tenant(request, fields.cache_salt)
    return (await _ask_chat(service, fields, asked, tenant))[0]


async def _completion(service: Service, request: Request) -> Reply:
    arrived = time.perf_counter()
    service.check_open()
    fields = await fields_of(request, CompletionFields, service)
    name = service.model_name(fields.model)
    service.check_open()
    place = service.enter(fields.n * len(fields.prompt))
    tokenizer, fingerprint = service.worker.model.tokenizer, service.options.fingerprint
    shape = CompletionShape(name, fingerprint, tokenizer, fields.logprobs is not None)
    prepare = partial(_ask_text, service, fields, _tenant(request, fields.cache_salt))
    return _reply(service, fields, shape, prepare, place, arrived)


async def _ask_text(
    service: Service, fields: CompletionFields, tenant: str
) -> Sequence[ticket.Request]:
    model, context = service.worker.model, service.context
    defaults = service.options.defaults

    def written() -> list[ticket.Request]:
        return [
            one
            for text in fields.prompt
            for one in asking.requests(
                asking.text_prompt(text, model), (), fields, model, context, defaults, tenant
            )
        ]

    try:
        return await service.quickly(written)
    except InputError as error:
        raise ApiError(400, str(error), param="prompt") from error


def _reply(service: Service, fields: Any, shape: Any, prepare: Any, place: Any, arrived: float):
    service.metrics.observe("request_params_n", fields.n)
    service.metrics.observe("request_params_max_tokens", fields.limit)
    return Reply(service, fields, shape, prepare, place, arrived)


def _tenant(request: Request, salt: str | None) -> str:
    """Requests of other keys, and with other salts, find nothing of this one's."""
    return f"{request.scope['tenant']}:{salt or ''}"


# --- What needs no engine -------------------------------------------------------------------------


def _json(value: dict[str, Any]) -> Response:
    return Response(dumps(value), media_type="application/json")


def _entry(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "llava-mini",
        "max_model_len": service.context,
        "root": service.options.names[0],
        "parent": None,
    }


async def _models(service: Service, request: Request) -> Response:
    names = service.options.names
    return _json({"object": "list", "data": [_entry(service, name) for name in names]})


async def _model(service: Service, request: Request) -> Response:
    return _json(_entry(service, service.model_name(request.path_params["name"])))


async def _health(service: Service, request: Request) -> Response:
    """Whether the process should live on; not whether it is ready."""
    if service.worker.state == "dead":
        raise ApiError(503, "the engine has stopped working")
    return Response(status_code=200)


async def _ready(service: Service, request: Request) -> Response:
    if not service.is_ready:
        told = "the server is shutting down" if service.draining else "the engine is not ready"
        raise ApiError(503, told, retry_after=1)
    return Response(status_code=200)


async def _metrics(service: Service, request: Request) -> Response:
    return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})


async def _version(service: Service, request: Request) -> Response:
    return _json({"version": llava_mini_jax.__version__})


async def _load(service: Service, request: Request) -> Response:
    return _json({"server_load": service.admission.held})
