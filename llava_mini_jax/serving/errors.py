"""What clients are told of errors: one shape, by status, with nothing of the machine in it."""

from typing import Any

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestTooLarge",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


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
                "message": self.message,
                "type": TYPES[self.status],
                "param": self.param,
                "code": self.status,
            }
        }
