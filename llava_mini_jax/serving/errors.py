"""What clients are told of errors: one shape, by status, with nothing of the machine in it.

ApiError, and whatever else ends a request --body--> {"error": {message, type, param, code}}
                                                        '-- through `clean`, the one such place
"""

import re
from typing import Any

from llava_mini_jax.errors import InputError

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLarge",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
LONGEST = 4000  # characters of a message
_DEFECT = "the server failed to answer this request; its log says why"

_MACHINE = re.compile(
    r"Traceback \(most recent call last\).*"
    r"|<[^<>]*\b(?:object|class|function|method|module|built-in)\b[^<>]*>"  # reprs
    r"|\b0x[0-9a-f]{4,}\b"  # addresses
    # Paths of two names or more; the server's own begin with /v1.
    r"|(?<![\w.:/<])[~.]{0,2}/(?!v1/)[\w.+@~-]+(?:/[\w.+@~-]+)+/?"
    r"|\b[a-z]:\\[^\s\"']+"
    r"|\b(?:\w+\.)*\w+(?:Error|Exception)\b:?"  # names of classes
    r"|\b(?:llava_mini_jax|jax|jaxlib|numpy|PIL|av|starlette|uvicorn|pydantic)(?:\.\w+)+",
    re.IGNORECASE | re.DOTALL,
)


class ApiError(Exception):
    """An error with the status that its client gets. `message` is one sentence for the client."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, retry_after: int | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.retry_after = retry_after  # seconds

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": clean(self.message),
                "type": TYPES[self.status],
                "param": self.param,
                "code": self.status,
            }
        }


def clean(message: str) -> str:
    """A message without paths, addresses, tracebacks and names of classes, on one line."""
    # Cut first: what follows looks at every character more than once.
    return " ".join(_MACHINE.sub("...", message[:LONGEST]).split())


def of(error: BaseException, param: str | None = None) -> ApiError:
    """What a client is told of any exception: bad input is its own, the rest is a defect."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return ApiError(400, str(error), param=param)
    return ApiError(500, _DEFECT)
