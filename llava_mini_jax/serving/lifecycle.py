"""The server from its socket to its end.

listen_on --socket--> run: uvicorn, our signals
SIGTERM, Ctrl-C --> drain: /ready 503, then new work 503, answers end --> status 0
            a second one --> the process ends at once
"""

import asyncio
import contextlib
import errno
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from llava_mini_jax import signals
from llava_mini_jax.errors import InputError
from llava_mini_jax.serving.connection import protocol
from llava_mini_jax.serving.service import Service

LOG = logging.getLogger(__name__)
KEPT_OPEN = 75  # seconds that an idle connection is kept; load balancers keep theirs for 60
PROGRESS_SECONDS = 10.0  # between two lines about what is compiled
_CLOSING = 5  # seconds for connections to end, once nobody is answered any more
# Seconds after which a thread that computes hands over (Python's own: 0.005): the event loop waits
# as long for each of the others, several times a request.
SWITCH_SECONDS = 0.001
_SAME = 0.05  # seconds: a terminal and a wrapper both hand one signal on
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def listen_on(host: str, port: int) -> socket.socket:
    """A socket that is bound, and not yet listening; InputError where that cannot be."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {host} is not an address of this machine ({error})") from error
    family, kind, number, _, address = found[0]
    bound = socket.socket(family, kind, number)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"port {port} of {host} is in use by another program; give another --port, or end "
                "that one"
            ) from error
        raise InputError(
            f"the server cannot listen on {host}, port {port} ({os.strerror(error.errno or 0)})"
        ) from error
    return bound


def run(app: ASGIApp, service: Service, bound: socket.socket) -> None:
    """Serves until a signal has ended it, and everybody has been answered."""
    sys.setswitchinterval(SWITCH_SECONDS)
    Server(config(app, service), service).run(sockets=[bound])


def config(app: ASGIApp, service: Service) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=protocol(service.options.body_timeout),
        ws="none",
        loop="asyncio",  # others would take the signals' descriptor (signals.py)
        lifespan="off",
        log_config=None,
        server_header=False,
        timeout_keep_alive=KEPT_OPEN,
        timeout_graceful_shutdown=_CLOSING,
    )


def progress(done: int, total: int, seconds: float) -> str:
    """How many programs are compiled after so many seconds, and how long the others may take."""
    left = f", about {seconds / done * (total - done):.0f} s left" if done else ""
    return f"compiling: {done} of {total} programs after {seconds:.0f} s{left}"


class Server(uvicorn.Server):
    """uvicorn's, but for signals: it would close the socket at once, and end by the signal."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service, self._state, self._began = service, "starting", time.monotonic()
        self._said_at = self._began  # of the last line about what is compiled
        self._signalled_at: float | None = None
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        self._loop = asyncio.get_running_loop()
        if threading.current_thread() is not threading.main_thread():
            yield  # Python lets the main thread alone hear of signals
            return
        before = {number: signal.signal(number, self._signalled) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def on_tick(self, counter: int) -> bool:
        if (state := self._service.worker.state) != self._state:
            self._state = state
            LOG.info("the engine is %s, after %.0f s", state, time.monotonic() - self._began)
            if threading.current_thread() is threading.main_thread():  # the process is ours
                # What is there now stays: looking through all of JAX for garbage, as Python does
                # now and then, would stop every answer for tenths of a second.
                gc.collect()
                gc.freeze()
        elif state == "starting":
            self._say_progress(time.monotonic())
        return await super().on_tick(counter)

    def _say_progress(self, now: float) -> None:
        """A line now and then, at a terminal and in a log alike."""
        done, total = self._service.worker.compiling
        if total and now - self._said_at >= PROGRESS_SECONDS:
            self._said_at = now
            LOG.info("%s", progress(done, total, now - self._began))

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signalled_at is None:
            self._signalled_at = now
            self._loop.call_soon_threadsafe(self._begin_to_drain, number)
        elif now - self._signalled_at > _SAME:
            signals.say("llava-mini serve: ended at once, by a second signal")
            os._exit(128 + number)
        if number == signal.SIGINT:
            signals.dealt_with()

    def _begin_to_drain(self, number: int) -> None:
        # Somebody at a terminal has no load balancer that must hear of it first.
        delay = self._service.options.drain_delay if number == signal.SIGTERM else 0.0
        self._draining = asyncio.ensure_future(self._drain(delay))

    async def _drain(self, delay: float) -> None:
        try:
            await self._service.drain(delay=delay)
        finally:
            self.should_exit = True
