"""Judges for tests: the golden sets' canned replies, and the requests that they were given to."""

import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from llava_mini_jax.evaluation.judge.judging import Reply, replies_of
from tests import golden_data

GOLDEN = golden_data.folder("eval")
CLOSE = dict(rel=0, abs=1e-6)  # what the project promises of every figure
DATE = "2025-01-08T12:00:00+00:00"
_TAG = re.compile(r"\[item \w+\]")

# The official texts are not ours to keep. Where somebody has them, in files as docs describe
# (mmvet.json, video_qa.json, video_chatgpt.json), these tests compare every request.
_WORDING = os.environ.get("LLAVA_MINI_JUDGE_WORDING")
needs_wording = pytest.mark.skipif(
    _WORDING is None, reason="LLAVA_MINI_JUDGE_WORDING names no folder with the official texts"
)


def wording(file):
    return Path(_WORDING or "") / file


def read(path):
    return json.loads((GOLDEN / path).read_text(encoding="utf-8"))


def tag(text):
    """The last mark of an item in a text, by which the canned replies are told apart."""
    return _TAG.findall(text)[-1]


class Canned:
    """Gives each item its golden replies, one after the other; the last one repeats."""

    def __init__(self, replies):
        self._replies = replies
        self._asked = Counter()
        self.requests = {}  # by tag

    def __call__(self, request):
        item = tag(request.body["messages"][-1]["content"])
        given = self._replies[item]
        given = [given] if isinstance(given, str) else given
        text = given[min(self._asked[item], len(given) - 1)]
        self._asked[item] += 1
        self.requests.setdefault(item, []).append(request)
        return Reply(text=text, model=request.body["model"], date=DATE)


def judged(plan, replies):
    """(Replies, Canned): what the golden judge says to a plan."""
    canned = Canned(replies)
    return replies_of(plan, canned), canned


def check_requests(canned, expected):
    """The very requests that the official scripts sent, word for word."""
    assert set(canned.requests) == set(expected)
    for tag, wanted in expected.items():
        given = canned.requests[tag]
        assert len(given) == len(wanted), tag
        for request, one in zip(given, wanted, strict=True):
            messages = request.body["messages"]
            assert [m["role"] for m in messages] == one["roles"]
            digests = [hashlib.sha256(m["content"].encode()).hexdigest() for m in messages]
            assert digests == one["message_sha256"], tag
            for field in ("model", "temperature", "max_tokens"):
                assert request.body.get(field) == one[field], (tag, field)


def check_layout(canned, expected, parts):
    """Ours ask as often, as long after the item's own texts, with the same settings.

    `parts(tag)` are an item's texts in the user's message: what is left of its length is the
    wording's, one number for all first requests.
    """
    assert {tag: len(found) for tag, found in canned.requests.items()} == {
        tag: len(found) for tag, found in expected.items()
    }
    official, ours = set(), set()
    for tag, wanted in expected.items():
        own = sum(map(len, parts(tag)))
        official.add(wanted[0]["message_chars"][-1] - own)
        ours.add(len(canned.requests[tag][0].body["messages"][-1]["content"]) - own)
        for request, one in zip(canned.requests[tag], wanted, strict=True):
            for field in ("model", "temperature", "max_tokens"):
                assert request.body.get(field) == one[field], (tag, field)
    assert len(official) == len(ours) == 1
