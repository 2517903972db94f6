"""Another model as the judge of answers: what it is asked, what it said, what is read from that.

    Questions, Answers, Wording --Judge.plan--> JudgePlan: an Ask for each thing to be judged
                                                 |
    client.ask (a server, and a file of kept replies) ----.
    client.kept (that file alone, no network) ------------+--> Replies
                                                                  |
                       Benchmark.score(folder, questions, answers, replies=...) --> Scores
                       Judge.write(replies, out, model_id) --> the official scripts' files

A plan is pure: it lists all requests that may be sent. An Ask is a ladder of requests, climbed
until a reply can be read; so asking again, as official scripts do, is part of the plan, and scoring
is the same code whether replies come from a server or from a file. Which words a judge is asked
with: wording.py.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.benchmark import Output, Question, Scores
from llava_mini_jax.evaluation.judge.wording import Wording, read_wording


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeRequest:
    """One POST to {base URL}/chat/completions."""

    body: Mapping[str, Any]
    nth: int  # how many requests of its ladder before it have the very same body
    run: int  # of judgements that are made several times over

    @functools.cached_property
    def digest(self) -> str:
        """Names the reply in the file of kept replies."""
        text = json.dumps([self.body, self.nth, self.run], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class Ladder(NamedTuple):
    """An Ask as benchmarks write it."""

    key: str
    bodies: Sequence[Mapping[str, Any]]  # of requests, without the model
    run: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """One thing to be judged: requests in the order of sending, until a reply is readable."""

    key: str  # unique in the plan
    requests: Sequence[JudgeRequest]
    readable: Callable[[str], bool]  # by the official parser


@dataclasses.dataclass(frozen=True)
class Judged:
    """What is judged: a benchmark's questions and a model's answers to them."""

    questions: Sequence[Question]
    answers: Mapping[str, Output]


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgePlan:
    judged: Judged
    asks: Sequence[Ask]
    model: str
    wording: Wording
    options: Mapping[str, Any]  # of the benchmark's judge


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    text: str  # "" where the judge refused, or its server
    model: str  # as the server calls itself
    date: str  # ISO, UTC
    refused: str = ""  # why the server refused the request for good; "" where it did not


class NoReplyError(Exception):
    """Why there is no reply to a request; its text holds no key."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replies:
    """What a judge said. Pending asks have no reply yet: asking again pays for these alone."""

    plan: JudgePlan
    by_key: Mapping[str, Sequence[Reply]]  # of asks, in the order of their requests
    pending: Mapping[str, str]  # of asks: why
    sent: int = 0  # requests answered by the server now; all other replies had been kept

    def final(self, key: str) -> str | None:
        """The text of the last reply to an ask; None while it is pending, or if nobody asked."""
        return self.by_key[key][-1].text if key in self.by_key else None

    def about(self) -> dict[str, Any]:
        """What every judged score says: who judged, in whose words, when, and what is lacking."""
        every = [(key, reply) for key, replies in self.by_key.items() for reply in replies]
        given = [reply for _, reply in every if not reply.refused]
        refused = {key: reply.refused for key, reply in every if reply.refused}
        dates = sorted(reply.date for reply in given)
        return {
            "model": self.plan.model,
            "model as the server calls it": sorted({reply.model for reply in given}),
            "wording": self.plan.wording.label,
            "wording SHA-256": self.plan.wording.digest,
            "options": dict(self.plan.options),
            "first reply": dates[0] if dates else None,
            "last reply": dates[-1] if dates else None,
            "asks": len(self.plan.asks),
            "replies": len(given),
            "sent now": self.sent,
            "refused": len(refused),
            "first of the refused": dict(itertools.islice(refused.items(), 20)),
            "pending": len(self.pending),
            "first of the pending": dict(itertools.islice(self.pending.items(), 20)),
        }

    def value(self, value: float) -> float:
        """The value of a rule, or NaN while asks are pending: no figure rather than a wrong one."""
        return math.nan if self.pending else value


def climb(ask: Ask, send: Callable[[JudgeRequest], Reply]) -> list[Reply]:
    """Replies of one ladder, which a refusal ends; raises NoReplyError where `send` does."""
    replies = []
    for request in ask.requests:
        replies.append(send(request))
        if replies[-1].refused or ask.readable(replies[-1].text):
            break
    return replies


def replies_of(plan: JudgePlan, send: Callable[[JudgeRequest], Reply], sent: int = 0) -> Replies:
    """Replies of all ladders, one after the other."""
    found, pending = {}, {}
    for ask in plan.asks:
        try:
            found[ask.key] = climb(ask, send)
        except NoReplyError as reason:
            pending[ask.key] = str(reason)
    return Replies(plan=plan, by_key=found, pending=pending, sent=sent)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
    """How a benchmark is judged."""

    model: str  # that the official script asks
    ours: Mapping[str, str]  # our wording, by name of text
    official: Mapping[str, str]  # the official wording's SHA-256, by name of text
    source: str  # where one gets the official wording
    # Of the texts of the wording and the judge's options.
    ladders: Callable[[Judged, Mapping[str, str], Mapping[str, Any]], Sequence[Ladder]]
    readable: Callable[[str], bool]
    # (replies, out, model_id): the official scripts' result files, about what the plan judged
    write: Callable[[Replies, Path, str], list[Path]]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # and their defaults

    def plan(
        self,
        questions: Sequence[Question],
        answers: Mapping[str, Output],
        *,
        wording: Path | None = None,
        model: str | None = None,
        options: Mapping[str, Any] | None = None,
        fields: Mapping[str, Any] | None = None,
    ) -> JudgePlan:
        """All requests that may be sent about these answers.

        `wording` is a file of the official texts, None for ours; `model` None is the official one.
        `fields` are added to every request, None takes one out (newer judges want
        {"max_tokens": None, "max_completion_tokens": 16}).

        Raises InputError for an option that the judge does not have, and for a file of wording that
        does not hold all texts.
        """
        unknown = sorted(set(options or {}) - set(self.options))
        if unknown:
            raise InputError(
                f"the judge has no option {', '.join(unknown)}; it has"
                f" {', '.join(self.options) or 'none'}"
            )
        chosen = {**self.options, **(options or {})}
        texts = read_wording(wording, self.ours, self.official, self.source)
        name, judged = model or self.model, Judged(questions, answers)
        asks = []
        for key, bodies, run in self.ladders(judged, texts.texts, chosen):
            requests: list[JudgeRequest] = []
            body: dict[str, Any] = {}
            for number, given in enumerate(bodies):
                if number == 0 or given is not bodies[number - 1]:  # many ladders repeat one body
                    merged = {"model": name, **given, **(fields or {})}
                    body = {field: value for field, value in merged.items() if value is not None}
                nth = sum(request.body == body for request in requests)
                requests.append(JudgeRequest(body=body, nth=nth, run=run))
            asks.append(Ask(key=key, requests=requests, readable=self.readable))
        return JudgePlan(judged=judged, asks=asks, model=name, wording=texts, options=chosen)


def scored_by(name: str, score: Callable[[Judged, Replies], Scores]) -> Callable[..., Scores]:
    """`Benchmark.score` of a judged benchmark: raises InputError where it gets no `replies`."""

    def with_replies(
        folder: Path,
        questions: Sequence[Question],
        answers: Mapping[str, Output],
        *,
        replies: Replies | None = None,
    ) -> Scores:
        if replies is None:
            raise InputError(
                f"{name} is graded by another model: give its endpoint, or the file of replies"
                " that an earlier run kept"
            )
        return score(Judged(questions, answers), replies)

    return with_replies
