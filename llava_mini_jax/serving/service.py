"""What all routes share: the engine, who may enter, threads for work that would block the loop.

Options, Worker, MediaReader --> Service --admission, metrics, pools--> routes
                                    '-- open --drain--> closed: replies end, and nothing enters
"""

import asyncio
import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from llava_mini_jax.inference.ticket import Medium
from llava_mini_jax.inference.worker import Worker
from llava_mini_jax.serving.admission import Admission, Place
from llava_mini_jax.serving.asking import Defaults
from llava_mini_jax.serving.errors import ApiError
from llava_mini_jax.serving.generation import Post
from llava_mini_jax.serving.limits import Limits
from llava_mini_jax.serving.metrics import Load, Metrics
from llava_mini_jax.serving.parts import ImagePart, VideoOptions, VideoPart

T = TypeVar("T")
# Behind a model's name: images one behind the other are the frames of a film. Clients such as
# lmms-eval send films so, and nothing else in their requests says it.
AS_FILM = ":frames-as-video"
_TICK = 0.02  # seconds between two looks at who is left


class Reader(Protocol):
    """serving/media.py: MediaReader, on a thread."""

    fetched: Callable[[float], None]  # is told the seconds that a request's remote files took

    def read(
        self, parts: Sequence[ImagePart | VideoPart], video: VideoOptions, tenant: str
    ) -> list[Medium]: ...


class Ending(Protocol):
    """What is being answered: reply.py's Reply."""

    def fail(self, error: Exception) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the operator wants it to be."""

    names: tuple[str, ...]  # under which the model is asked for
    keys: frozenset[bytes] = frozenset()  # SHA-256 of each; none: everybody may ask
    open_metrics: bool = False  # /metrics needs no key
    limits: Limits = field(default_factory=Limits)
    defaults: Defaults = field(default_factory=Defaults)
    fingerprint: str = ""
    max_queued: int = 128  # answers in the house, running and waiting
    queue_timeout: float = 300.0  # seconds that a request waits for its first work at most
    drain_timeout: float = 60.0  # seconds for answers to end after SIGTERM
    drain_delay: float = 0.0  # seconds after SIGTERM in which requests are still taken
    body_timeout: float = 60.0  # seconds for a body to arrive
    keep_alive: float = 5.0  # seconds of silence in a stream before a comment
    origins: tuple[str, ...] = ()  # web pages of others that may ask
    vllm_metrics: bool = False
    media_threads: int = 4


class Service:
    """Used on the event loop only, but for `call`'s work."""

    def __init__(self, worker: Worker, reader: Reader, options: Options):
        self.worker, self.reader, self.options = worker, reader, options
        self.created = int(time.time())
        # Positions of a prompt and its answer together.
        self.context = max(lane.length for lane in worker.lanes)
        self.admission = Admission(options.max_queued, worker.counts().slots)
        self.metrics = Metrics(options.names[0], self.load, aliases=options.vllm_metrics)
        reader.fetched = functools.partial(self.metrics.observe, "media_fetch_seconds")
        self.post = Post()
        self.replies: set[Ending] = set()
        self.draining = self.closed = False
        # Apart, so that no body waits to be read behind a film that is being fetched.
        self._quick = ThreadPoolExecutor(2, "serving-quick")
        self._media = ThreadPoolExecutor(options.media_threads, "serving-media")

    @property
    def is_ready(self) -> bool:
        return self.worker.state == "ready" and not self.draining

    def check_open(self) -> None:
        """ApiError 503 where no work is taken."""
        if self.closed:
            self.metrics.count("admission_rejections", "draining")
            raise ApiError(503, "the server is shutting down", retry_after=1)
        if self.worker.state != "ready":
            self.metrics.count("admission_rejections", "not_ready")
            told = "starting" if self.worker.state == "starting" else "not working"
            raise ApiError(503, f"the engine is {told}; try again later", retry_after=5)

    def enter(self, count: int) -> Place:
        try:
            return self.admission.enter(count)
        except ApiError as error:
            if error.status == 429:
                self.metrics.count("admission_rejections", "queue_full")
            raise

    def late(self) -> ApiError:
        """For a request whose work has not begun in time."""
        self.metrics.count("admission_rejections", "queue_timeout")
        seconds = self.options.queue_timeout
        return self.admission.full(f"the request has waited {seconds:g} s for its turn")

    def model_name(self, asked: str) -> str:
        """The name that a request calls the model by; ApiError 404 where it is another's."""
        names = self.options.names
        if asked and asked.removesuffix(AS_FILM) not in names:
            known = ", ".join(names)
            raise ApiError(
                404, f"the model {asked[:100]!r} does not exist; give {known}", param="model"
            )
        return asked or names[0]

    async def quickly(self, work: Callable[..., T], *args: Any) -> T:
        """Work of milliseconds, on a thread."""
        return await self._on(self._quick, work, *args)

    async def read_media(self, *args: Any) -> list[Medium]:
        began = time.perf_counter()
        found = await self._on(self._media, self.reader.read, *args)
        self.metrics.observe("media_decode_seconds", time.perf_counter() - began)
        return found

    @staticmethod
    async def _on(pool: ThreadPoolExecutor, work: Callable[..., T], *args: Any) -> T:
        # Cancelled before a thread has taken it up, it is never done.
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(pool, functools.partial(work, *args))

    def load(self) -> Load:
        counts = self.worker.counts()
        with_engine = counts.running + counts.waiting
        return Load(
            running=counts.running,
            waiting=max(self.admission.held - counts.running, counts.waiting),
            deferred=max(self.admission.held - with_engine, 0),
            slots=counts.slots,
            slots_in_use=counts.slots_in_use,
            kv_usage=counts.kv_usage,
            compilations=counts.compilations,
            media=counts.media,
            media_bytes=counts.media_bytes,
        )

    async def drain(self, *, delay: float) -> None:
        """Not ready at once; closed after `delay`; returns when nobody is left to be answered.

        Answers that take longer than the timeout end with an error.
        """
        self.draining = True
        await asyncio.sleep(delay)
        self.closed = True
        await self._until_empty(self.options.drain_timeout)
        for reply in set(self.replies):
            reply.fail(ApiError(503, "the server is shutting down", retry_after=1))
        await self._until_empty(2.0)

    async def _until_empty(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.replies and time.monotonic() < end:
            await asyncio.sleep(_TICK)

    def close(self) -> None:
        """Threads are not waited for: a film may be on its way for a while."""
        for pool in (self._quick, self._media):
            pool.shutdown(wait=False, cancel_futures=True)
