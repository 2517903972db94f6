"""Who is let in: so many answers at a time, waiting ones included; others are told when to come.

request --enter(n)--> Place --leave--> room for others
           '--full--> ApiError 429, Retry-After from the queue and recent answers' seconds
"""

import math

from llava_mini_jax.serving.errors import ApiError

LONGEST_WAIT = 120  # seconds that clients are asked to wait at most: SDKs heed no more
_NEWEST = 0.1  # weight of the newest answer in the running mean


class Admission:
    """Used on the event loop only. `held` counts answers: a request with n choices counts n."""

    def __init__(self, most: int, slots: int):
        self.most, self.slots = most, max(slots, 1)
        self.held = 0
        self._seconds = 1.0  # that an answer holds a slot

    def enter(self, count: int) -> "Place":
        """Room for `count` answers; ApiError 429 if there is none now, 400 if there never is."""
        if count > self.most:
            raise ApiError(
                400,
                f"n is {count}, but this server takes {self.most} answers at a time; ask for fewer",
                param="n",
            )
        if self.held + count > self.most:
            raise self.full()
        self.held += count
        return Place(self, count)

    def full(self, reason: str = "the queue is full") -> ApiError:
        wait = self.retry_after()
        return ApiError(429, f"{reason}; try again in {wait} s", retry_after=wait)

    def retry_after(self) -> int:
        """Seconds after which those that are here now will mostly be gone."""
        return min(LONGEST_WAIT, max(1, math.ceil(self.held * self._seconds / self.slots)))

    def served(self, seconds: float) -> None:
        """An answer has held a slot for so long."""
        self._seconds += _NEWEST * (seconds - self._seconds)


class Place:
    """Held from admission until the last byte of the answer is sent, or its client is gone."""

    def __init__(self, admission: Admission, count: int):
        self._admission, self._count = admission, count

    def leave(self) -> None:
        self._admission.held -= self._count
        self._count = 0
