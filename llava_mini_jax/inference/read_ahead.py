"""Frames that a thread reads ahead of whoever computes with them."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np


class ReadAhead(Iterator[np.ndarray]):
    """The same frames, read from now on by a thread that is at most `most` of them ahead."""

    def __init__(self, frames: Iterator[np.ndarray], most: int):
        self._ready: queue.Queue = queue.Queue(most)
        self._gone = threading.Event()
        self._ended = threading.Event()
        # Not self: who drops it ends the thread.
        work = (frames, self._ready, self._gone, self._ended)
        threading.Thread(target=_read, args=work, daemon=True).start()

    def __next__(self) -> np.ndarray:
        frame, error = self._ready.get()
        if frame is None:
            self._ready.put((None, error))  # the end stays the end
            raise StopIteration if error is None else error
        return frame

    def ready(self, count: int) -> bool:
        """Whether the next `count` frames, or all up to the end, are there without waiting."""
        return self._ready.qsize() >= min(count, self._ready.maxsize) or self._ended.is_set()

    def close(self) -> None:
        """Ends the thread; nothing more may be read."""
        self._gone.set()

    def __del__(self) -> None:
        self._gone.set()


def _read(
    frames: Iterator[np.ndarray],
    ready: queue.Queue,
    gone: threading.Event,
    ended: threading.Event,
) -> None:
    def put(item: Any) -> None:
        while not gone.is_set():
            try:
                # In short waits: nobody makes room once the reader is dropped.
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    try:
        for frame in frames:
            put((frame, None))
            if gone.is_set():
                return
        put((None, None))
    except Exception as error:
        put((None, error))
    finally:
        ended.set()
