"""Malformed bodies of chat requests, for servers that must answer each with a 4xx or an answer.

    a good body --one to three faults, at any place of its tree--> JSON --its text--> bytes

A function of the seed alone. Two of ten are left whole, so that answers are among the replies. What
answers must never hold is MACHINE of test_media.py.
"""

import base64
import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from tests.serving.test_media import picture, saved
from tests.serving.test_media_fuzz import damaged, sources, strange_url

SPECIAL = ("<image>", "<s>", "</s>", "<unk>", "<pad>", "<|eot_id|>", "<|begin_of_text|>", "<0x0A>",
           "<|start_header_id|>system<|end_header_id|>", "<video>", "ASSISTANT:", "{{ 7 * 7 }}",
           "\ue0000\ue001")  # fmt: skip
TEXTS = (*SPECIAL, "", " ", "\0", "\ud800", "\udfff\ud800", "\u202e", "e\u0301" * 50,
         "\U0001f468\u200d\U0001f469" * 9, "<script>alert(1)</script>", "../../etc/passwd", "%s%n",
         "'; --", "\r\n\r\ndata: [DONE]",
         "x" * 5000, "<image>" * 300)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 7, 16, 17, 64, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1,
           10**30, 10**400, 0.0, -0.0, 0.5, 1.0, 1.5, 2.0000001, 1e-320, 1e308, float("nan"),
           float("inf"), float("-inf"))  # fmt: skip
OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    {"": None},
    [{}],
    {"type": "text"},
)
FIELDS = ("temperature", "top_p", "top_k", "seed", "n", "max_tokens", "max_completion_tokens",
          "stop", "stop_token_ids", "min_tokens", "ignore_eos", "logprobs", "top_logprobs", "model",
          "tools", "presence_penalty", "frequency_penalty", "repetition_penalty", "stream",
          "stream_options", "response_format", "tool_choice", "logit_bias", "cache_salt", "user",
          "vision_tokens", "media_io_kwargs", "mm_processor_kwargs", "messages", "priority",
          "uuid")  # fmt: skip
ROLES = ("user", "assistant", "system", "developer", "tool", "function", "", "User", "human")
GOOD = base64.b64encode(saved(picture())).decode()


def bodies(count: int = 10_000, seed: int = 0) -> Iterator[bytes]:
    """So many bodies; those of fewer are the first of more."""
    rng, files = random.Random(seed), sources()
    for _ in range(count):
        body = good(rng, files)
        if rng.random() < 0.2:
            yield json.dumps(body).encode()
            continue
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            body = changed(body, rng, files)
        yield broken(json.dumps(body, ensure_ascii=rng.random() < 0.8), rng)


def good(rng: random.Random, files: list[bytes]) -> dict[str, Any]:
    """A body that a server answers, with few tokens."""
    media = [part for part in (image(rng), film(rng, files)) if rng.random() < 0.4]
    text = rng.choice(("What is this?", *SPECIAL))
    content: Any = [*media, {"type": "text", "text": text}] if media else text
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": rng.randrange(1, 4),
        "temperature": rng.choice((0, 0.7)),
        "seed": rng.randrange(100),
    }
    if rng.random() < 0.3:
        earlier = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": text}]
        body["messages"] = [*earlier, *body["messages"]]
    if rng.random() < 0.2:
        body["messages"].insert(0, {"role": "system", "content": text})
    more: dict[str, Any] = {"stream": True, "n": 2, "stop": ["a", "</s>"], "logprobs": True,
                            "top_p": 0.9, "top_k": 5, "ignore_eos": True, "user": "x"}  # fmt: skip
    return body | {name: more[name] for name in more if rng.random() < 0.15}


def image(rng: random.Random) -> dict[str, Any]:
    url = {"url": f"data:image/png;base64,{GOOD}", "detail": rng.choice(("auto", "low", "high"))}
    return {"type": "image_url", "image_url": url} | ({"uuid": "a"} if rng.random() < 0.2 else {})


def film(rng: random.Random, files: list[bytes]) -> dict[str, Any]:
    url = "data:video/jpeg;base64," + ",".join([GOOD] * rng.randrange(1, 4))
    return {"type": "video_url", "video_url": {"url": url}}


def changed(body: Any, rng: random.Random, files: list[bytes]) -> Any:
    """A body with one place of its tree another."""
    body = copy.deepcopy(body)
    places = list(_places(body))
    if not places:
        return _value(rng, files)
    holder, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0 and isinstance(holder, dict):
        del holder[key]
    elif kind == 1 and isinstance(body, dict):
        body[rng.choice(FIELDS)] = _value(rng, files)
    elif kind == 2:
        other, name = rng.choice(places)
        holder[key] = copy.deepcopy(other[name])
    elif kind == 3 and isinstance(holder, list):
        holder[key:key] = [copy.deepcopy(holder[key])] * rng.choice((1, 2, 40))
    else:
        holder[key] = _value(rng, files)
    return body


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key) of every value in a tree."""
    keys: Any = value if isinstance(value, dict) else range(len(value)) if (
        isinstance(value, list)) else ()  # fmt: skip
    for key in list(keys):
        yield value, key
        yield from _places(value[key])


def _value(rng: random.Random, files: list[bytes]) -> Any:
    makers: tuple[Callable[[], Any], ...] = (
        lambda: rng.choice(TEXTS),
        lambda: rng.choice(NUMBERS),
        lambda: copy.deepcopy(rng.choice(OTHERS)),
        lambda: rng.choice(ROLES),
        lambda: nested(rng.choice((3, 30, 90)), rng.random() < 0.5),
        lambda: strange_url(rng, GOOD),
        lambda: {"url": strange_url(rng, GOOD), "detail": rng.choice((None, 1, "low", "huge"))},
        lambda: _damaged_picture(rng, files),
        lambda: {"video": {rng.choice(("fps", "num_frames", "x")): rng.choice(NUMBERS)}},
        lambda: [rng.choice(NUMBERS) for _ in range(rng.randrange(100))],
    )
    return rng.choice(makers)()


def _damaged_picture(rng: random.Random, files: list[bytes]) -> dict[str, Any]:
    content = base64.b64encode(damaged(rng.choice(files), rng)).decode()
    kind = rng.choice(("image", "video"))
    return {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{kind}/jpeg;base64,{content}"}}


def nested(depth: int, lists: bool) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if lists else {"a": value}
    return value


def broken(text: str, rng: random.Random) -> bytes:
    """The body's bytes, one of ten of them not valid JSON, or no text."""
    content = text.encode("utf-8", "surrogatepass")
    if rng.random() > 0.1:
        return content
    return rng.choice(
        (
            lambda: content[: rng.randrange(len(content))],
            lambda: content + b"}",
            lambda: b"[" * 100_000,
            lambda: b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
            lambda: content.replace(b":", b"=", 1),
            lambda: content.replace(b"0", b"0" * 5000, 1),
            lambda: content.replace(b'"user"', b'"\\ud800"', 1),
            lambda: content.replace(b"e", b"\xff", 1),
            lambda: b"\xef\xbb\xbf" + content,
            lambda: text.encode("utf-16", "surrogatepass"),
            lambda: b"",
            lambda: b"null",
            lambda: b'"' + b"x" * 1000 + b'"',
            lambda: content[:-1] + b', "messages": []}',
            lambda: content[:-1] + b', "temperature": 1e999}',
            lambda: content[:-1] + b', "seed": ' + b"9" * 6000 + b"}",
        )
    )()
