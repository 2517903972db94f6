"""The fields of a request: their types, their ranges, and what they say together.

    JSON object --read--> ChatFields | CompletionFields     (pydantic, strict types)
                   '----> ApiError 400, `param` names the first field that is wrong

Unknown fields are ignored, and null is a field that was not given.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from llava_mini_jax.serving.body import shown, told
from llava_mini_jax.serving.errors import ApiError
from llava_mini_jax.serving.limits import Limits

STOP_IDS = 64  # `stop_token_ids` of a request
INT64 = 2**63


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Strict(BaseModel):
    """Fields have the types of their JSON: "5" is not a number, nor are Infinity and NaN."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class ResponseFormat(Strict):
    type: str


class VideoFields(Strict):
    """Which frames of a film; whatever else could move the server's work is refused."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    num_frames: Annotated[int, Field(ge=-1)] | None = None
    fps: float | None = None


class MediaFields(Strict):
    model_config = ConfigDict(strict=True, extra="forbid")
    video: VideoFields | None = None


GUIDED = ("guided_json", "guided_regex", "guided_choice")


class Fields(Strict):
    """What both ways to ask have in common."""

    model: str = ""
    max_tokens: Annotated[int, Field(ge=1, lt=INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    n: Annotated[int, Field(ge=1)] = 1
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_listed)] = []
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=STOP_IDS)] = []
    min_tokens: Annotated[int, Field(ge=0)] = 0
    ignore_eos: bool = False
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    logit_bias: dict[str, Any] = {}
    # Of vLLM's: what changes the tokens or the text, and is known by name to be refused.
    min_p: float = 0.0
    use_beam_search: bool = False
    bad_words: list[Any] = []
    allowed_token_ids: list[Any] = []
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    include_metrics: bool = False  # ours: `metrics` of this request in its answer

    @property
    def limit(self) -> int | None:
        """Tokens that an answer may have, where the client says so."""
        return self.max_tokens


class ChatFields(Fields):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0)] = 0
    tools: list[Any] = []
    tool_choice: Any = None
    media_io_kwargs: MediaFields | None = None
    mm_processor_kwargs: dict[str, Any] = {}
    vision_tokens: int | Literal["all"] | None = None  # ours: of an image

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionFields(Fields):
    prompt: Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, lt=INT64)] | None = 16  # as OpenAI's
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool = False
    best_of: int | None = None
    suffix: str = ""


F = TypeVar("F", bound=Fields)


def read(kind: type[F], given: dict[str, Any], limits: Limits) -> F:
    """The fields of a body; ApiError 400 with `param` for those that are wrong."""
    try:
        fields = kind.model_validate(_without_null(given))
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        place = problems[0]["loc"]
        param = str(place[0])[:100] if place else None
        raise ApiError(400, told(problems), param=param) from None
    _check(fields, limits)
    if isinstance(fields, ChatFields):
        _check_chat(fields, limits)
    if isinstance(fields, CompletionFields):
        _check_completion(fields, limits)
    return fields


def _without_null(given: dict[str, Any], depth: int = 3) -> dict[str, Any]:
    """Without fields that are null, those inside of options too."""
    return {
        name: _without_null(value, depth - 1) if isinstance(value, dict) and depth > 1 else value
        for name, value in given.items()
        if value is not None
    }


def _check(fields: Fields, limits: Limits) -> None:
    """What depends on several fields, or on the server's limits."""
    if fields.n > limits.choices:
        raise _wrong("n", fields.n, f"give at most {limits.choices}")
    if len(fields.stop) > limits.stops:
        raise _wrong("stop", fields.stop, f"give at most {limits.stops}")
    if fields.stream_options is not None and not fields.stream:
        raise ApiError(
            400, "stream_options needs stream: true; leave it out", param="stream_options"
        )
    if fields.limit is not None and fields.min_tokens > fields.limit:
        raise _wrong(
            "min_tokens", fields.min_tokens, f"the answer may have only {fields.limit} tokens"
        )
    # Refused rather than ignored: answers would not be what was asked for.
    for name, neutral in (
        ("presence_penalty", 0),
        ("frequency_penalty", 0),
        ("repetition_penalty", 1),
        ("logit_bias", {}),
        *(("min_p", 0), ("use_beam_search", False), ("bad_words", []), ("allowed_token_ids", [])),
        *((name, None) for name in ("structured_outputs", *GUIDED)),
    ):
        if getattr(fields, name) != neutral:
            raise _wrong(name, getattr(fields, name), "it is not supported; leave it out")
    if fields.response_format is not None and fields.response_format.type != "text":
        kind = fields.response_format.type
        raise ApiError(
            400,
            f'response_format is of type {shown(kind)}, which is not supported; use "text"',
            param="response_format",
        )


def _check_chat(fields: ChatFields, limits: Limits) -> None:
    if fields.top_logprobs and not fields.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true; add it", param="top_logprobs")
    if fields.top_logprobs > limits.logprobs:
        raise _wrong("top_logprobs", fields.top_logprobs, f"give at most {limits.logprobs}")
    if fields.tools and fields.tool_choice != "none":
        raise ApiError(400, "tools are not supported; leave them out", param="tools")
    if fields.tool_choice not in (None, "none", "auto"):
        raise ApiError(400, "tool_choice is not supported; leave it out", param="tool_choice")
    if fields.mm_processor_kwargs:
        raise ApiError(
            400, "mm_processor_kwargs is not supported; leave it out", param="mm_processor_kwargs"
        )
    video = fields.media_io_kwargs and fields.media_io_kwargs.video
    if video is not None and video.num_frames == 0:
        raise ApiError(
            400,
            "media_io_kwargs.video.num_frames is 0; give 1 or more, or -1 for all",
            param="media_io_kwargs",
        )
    if video is not None and video.fps is not None and video.fps <= 0 and video.fps != -1:
        raise ApiError(
            400,
            f"media_io_kwargs.video.fps is {shown(video.fps)}; give frames a second above 0",
            param="media_io_kwargs",
        )


def _check_completion(fields: CompletionFields, limits: Limits) -> None:
    if fields.logprobs is not None and fields.logprobs > limits.logprobs:
        raise _wrong("logprobs", fields.logprobs, f"give at most {limits.logprobs}")
    if len(fields.prompt) * fields.n > limits.choices:
        raise _wrong("prompt", fields.prompt, f"prompts times n may be at most {limits.choices}")
    if fields.best_of not in (None, fields.n):
        raise _wrong("best_of", fields.best_of, "it is not supported; leave it out")
    for name in ("echo", "suffix"):
        if getattr(fields, name):
            raise _wrong(name, getattr(fields, name), "it is not supported; leave it out")


def _wrong(name: str, value: Any, remedy: str) -> ApiError:
    return ApiError(400, f"{name} is {shown(value)}; {remedy}", param=name)
