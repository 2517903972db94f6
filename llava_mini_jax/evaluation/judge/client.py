"""Replies of a judge from any OpenAI-compatible server, each paid for once.

    JudgePlan --threads, a ladder each--> is the reply kept? -- yes ---------------------> Reply
                                          | no                                              ^
                    POST {base}/chat/completions --whole response--> KEPT.jsonl (appended) -'
                          | 408, 409, 425, 429, 5xx, silence, garbage: wait, again, `tries` times
                          | 400, 413, 422: this request is refused for good, a Reply without text
                          '-> else: the ask is pending, with the reason

A reply is in the file before it is used, so a run that is killed and started again sends what was
under way and what is left, nothing else. A server that fails ten asks in a row, refuses the key or
is out of quota is left alone: all that is left is pending.

Refusals are of single requests (filtered, or longer than the judge reads) where the server goes on
answering others. Where it answers none, or none any more, all are asked wrongly, or the account is
empty: then they are pending. They cost nothing, so they are kept only when that is clear.

No reply is paid for twice; but what a server does with a request that it does not answer in time is
its own affair, so `timeout_s` should be generous.
"""

import datetime
import fcntl
import http.client
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.judge.http import (
    Endpoint,
    exchange,
    read_key,
    retry_after,
    said,
    text_of,
)
from llava_mini_jax.evaluation.judge.judging import (
    Ask,
    JudgePlan,
    JudgeRequest,
    NoReplyError,
    Replies,
    Reply,
    climb,
    replies_of,
)
from llava_mini_jax.journal import Journal

# 0 is silence, 200 garbage instead of a chat completion; from 520 on the codes of proxies that got
# nothing from the server behind them, and of overload.
_RETRIED = (0, 200, 408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529)
_REFUSED = (400, 413, 422)
_MOST_FAILURES = 10  # asks in a row


def ask(
    plan: JudgePlan,
    endpoint: Endpoint,
    file: Path,
    *,
    progress: Callable[[int], None] = lambda n: None,
) -> Replies:
    """Replies of all asks, from the file and from the server, which is sent only what is new.

    `progress` is told how many more asks are done. Raises InputError for a key that is missing or
    cannot be sent, and for a file that another process is writing.
    """
    key = read_key(endpoint)
    # Asks with the same words share the replies; within a plan, ladders that begin alike are alike.
    ladders: dict[str, list[Ask]] = {}
    for one in plan.asks:
        ladders.setdefault(one.requests[0].digest, []).append(one)
    with _locked(file):
        sender = _Sender(endpoint, key, Journal(file, _is_reply), plan)
        with ThreadPoolExecutor(endpoint.concurrency) as pool:
            try:
                running = {pool.submit(sender.climb, same[0]): same for same in ladders.values()}
                for future in as_completed(running):
                    future.result()
                    progress(len(running[future]))
            finally:  # where something is raised, an interrupt above all, nothing more is sent
                sender.stopped.set()
                pool.shutdown(cancel_futures=True)
        sender.end()
    return replies_of(plan, sender.found, sender.sent)


def kept(plan: JudgePlan, file: Path) -> Replies:
    """The replies that a file has already; no network, no key."""
    known = _by_digest(Journal(file, _is_reply, write=False))

    def look_up(request: JudgeRequest) -> Reply:
        if request.digest not in known:
            raise NoReplyError("not asked yet")
        return known[request.digest]

    return replies_of(plan, look_up)


class _Sender:
    """What the threads share. Everything that changes does so under the lock."""

    def __init__(self, endpoint: Endpoint, key: str | None, journal: Journal, plan: JudgePlan):
        self.stopped = threading.Event()
        self.sent = 0
        self._endpoint, self._key, self._journal = endpoint, key, journal
        self._known = _by_digest(journal)
        # Whether the server has answered any of the plan's requests.
        self._answers = any(r.digest in self._known for one in plan.asks for r in one.requests)
        self._refusals: list[dict[str, Any]] = []  # since its last answer: lines for the file
        self._failed: dict[str, str] = {}  # by digest: why there is no reply
        self._lock = threading.Lock()
        self._not_before = 0.0  # when a server that limits the rate takes requests again
        self._failures = 0  # asks in a row
        self._reason = "not asked: the run was stopped"

    def climb(self, one: Ask) -> None:
        try:
            climb(one, self._get)
        except NoReplyError as reason:
            if not self.stopped.is_set():
                with self._lock:
                    self._failures += 1
                    if self._failures >= _MOST_FAILURES:
                        self._stop(f"{self._failures} asks failed in a row, at last: {reason}")
        else:
            with self._lock:
                self._failures = 0

    def found(self, request: JudgeRequest) -> Reply:
        """What there is at the end."""
        if request.digest in self._known:
            return self._known[request.digest]
        raise NoReplyError(self._failed.get(request.digest, self._reason))

    def end(self) -> None:
        """When all threads are done."""
        if self._answers and len(self._refusals) <= _MOST_FAILURES:
            self._keep_refusals()

    def _keep_refusals(self) -> None:
        for line in self._refusals:
            self._journal.append(line)
            self._known[line["digest"]] = _reply(line)
        self._refusals.clear()

    def _get(self, request: JudgeRequest) -> Reply:
        if (reply := self._known.get(request.digest)) is not None:
            return reply
        try:
            line = self._send(request)
        except NoReplyError as reason:
            with self._lock:
                self._failed[request.digest] = str(reason)
            raise
        reply = _reply(line)
        with self._lock:
            if reply.refused:
                self._refusals.append(line)
                self._failed[request.digest] = reply.refused
                if not self._answers:  # a server that refuses everything is asked wrongly
                    raise NoReplyError(reply.refused)
                return reply
            self._journal.append(line)
            self._keep_refusals()
            self._answers = True
            self.sent += 1
            self._known[request.digest] = reply
        return reply

    def _send(self, request: JudgeRequest) -> dict[str, Any]:
        """A line of the file; raises NoReplyError after the last try, or where none would help."""
        content = json.dumps(request.body).encode()
        reason, wait = "", 0.0
        for number in range(self._endpoint.tries):
            self._wait(wait)
            began = time.monotonic()
            try:
                status, headers, data = exchange(self._endpoint, content, self._key)
            except (OSError, http.client.HTTPException) as error:
                status, headers, data = 0, {}, None
                spent = time.monotonic() - began
                reason = f"no response after {spent:.1f} s ({type(error).__name__})"
            if status == 200 and (text := text_of(data)) is not None:
                return self._line(request, data, text, time.monotonic() - began)
            if status:
                reason = said(status, data)
            if status in _REFUSED:
                line = self._line(request, data, "", time.monotonic() - began)
                return {**line, "refused": reason}
            wait = self._pause(number, status, retry_after(headers), reason)
        raise NoReplyError(f"{reason}, {self._endpoint.tries} times")

    def _pause(self, number: int, status: int, asked: float, reason: str) -> float:
        """Seconds to wait before the next try; raises NoReplyError if there should be none."""
        useless = status in (401, 404) or "insufficient_quota" in reason
        late = asked > self._endpoint.longest_wait_s
        if useless or late:
            wish = f"; it asks to wait for {asked:.0f} s" if late else ""
            with self._lock:
                self._stop(reason + wish)
        if useless or late or status not in _RETRIED:
            raise NoReplyError(reason)
        # Not all threads come back at the same moment.
        wait = self._endpoint.first_wait_s * 2**number * random.uniform(0.75, 1.0)
        wait = max(asked, min(wait, self._endpoint.longest_wait_s))
        if asked or status == 429:  # so that the other threads do not run into it as well
            with self._lock:
                self._not_before = max(self._not_before, time.monotonic() + wait)
        return wait

    def _line(self, request: JudgeRequest, data: Any, text: str, seconds: float) -> dict[str, Any]:
        settings = {k: v for k, v in request.body.items() if k != "messages"}
        return {
            "digest": request.digest,
            "text": text,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "request": {**settings, "nth": request.nth},
            "endpoint": self._endpoint.base_url,
            "seconds": round(seconds, 3),
            "response": data,
        }

    def _wait(self, seconds: float) -> None:
        """Until a request may be sent; raises NoReplyError once nothing more is to be sent."""
        until = time.monotonic() + seconds
        while (left := max(until, self._not_before) - time.monotonic()) > 0:
            if self.stopped.wait(left):
                break
        if self.stopped.is_set():
            raise NoReplyError(self._reason)

    def _stop(self, reason: str) -> None:
        if not self.stopped.is_set():
            self._reason = f"not asked, because {reason}"
            self.stopped.set()


def _is_reply(line: Mapping[str, Any]) -> bool:
    return isinstance(line.get("digest"), str) and isinstance(line.get("text"), str)


def _reply(line: Mapping[str, Any]) -> Reply:
    response = line.get("response")
    model = response.get("model") if isinstance(response, dict) else None
    asked = (line.get("request") or {}).get("model", "")
    return Reply(
        text=line["text"],
        model=str(model or asked),
        date=str(line.get("date", "")),
        refused=str(line.get("refused", "")),
    )


def _by_digest(journal: Journal) -> dict[str, Reply]:
    return {
        line["digest"]: _reply(line) for line in reversed(journal.lines)
    }  # the first one counts


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Keeps a second process from asking, and paying for, the same things."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f".{file.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another process is writing replies to {file}; wait until it ends, or give another"
                " file"
            ) from error
        yield
