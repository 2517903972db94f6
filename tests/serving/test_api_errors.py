"""What is wrong with a request: one shape, the right status, and nothing of the machine."""

import json
import socket
from typing import Any

import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.serving import errors
from llava_mini_jax.serving.body import parse, shown
from llava_mini_jax.serving.errors import ApiError, clean
from llava_mini_jax.serving.fields import ChatFields, read
from llava_mini_jax.serving.limits import Limits
from tests.serving import fake
from tests.serving.running import Client, joined, running

USER = {"role": "user", "content": "hello"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
CHAT = "/v1/chat/completions"


def said(**fields: Any) -> bytes:
    return json.dumps({"messages": [USER], **fields}).encode()


def told(messages: Any) -> bytes:
    return json.dumps({"messages": messages}).encode()


def parts(*content: Any) -> bytes:
    return told([{"role": "user", "content": list(content)}])


MALFORMED: list[tuple[bytes, str | None]] = [
    *((raw, None) for raw in (b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b"{]}")),
    *((raw, None) for raw in (b"[" * 100_000, b'{"a":' * 50_000, b"{'a': 1}", b"nonsense\x00")),
    (b'{"messages": [], "seed": %s}' % (b"9" * 5000), None),
    (b'{"temperature": NaN}', None),
    (b'{"temperature": -Infinity}', None),
    (b"{}", "messages"),
    *((told(wrong), "messages") for wrong in (None, [], {}, "hi", 3, [3], [[]], [None], [{}])),
    *(
        (told([{"role": role, "content": "x"}]), "messages")
        for role in ("", "tool", "function", None, 3, ["user"], {"a": 1}, "User")
    ),
    *(
        (told([{"role": "user", "content": wrong}]), "messages")
        for wrong in (None, 3, {}, True, [3], [None], [[]], [{}], [{"type": "text"}])
    ),
    (told([{"role": "user"}]), "messages"),
    (told([{"role": "assistant", "content": "x"}]), "messages"),
    (told([USER, USER]), "messages"),
    (told([USER, {"role": "assistant", "content": "a"}]), "messages"),
    (told([USER, {"role": "system", "content": "late"}, USER]), "messages"),
    (told([{"role": "system", "content": "alone"}]), "messages"),
    (told([{"role": "system", "content": [IMAGE]}, USER]), "messages"),
    (told([USER, {"role": "assistant", "content": [IMAGE]}, USER]), "messages"),
    (told([{"role": "user", "content": "half \ud800"}]), "messages"),
    *(
        (parts(wrong), "messages")
        for wrong in (
            {"type": "audio_url", "audio_url": {"url": "x"}},
            {"type": "input_audio"},
            {"type": ["text"]},
            {"type": "text", "text": 3},
            {"type": "image_url"},
            {"type": "image_url", "image_url": 3},
            {"type": "image_url", "image_url": {}},
            {"type": "image_url", "image_url": {"url": None}},
            {"type": "image_url", "image_url": {"url": 3}, "uuid": "a"},
            {"type": "image_url", "image_url": 3, "uuid": "a"},
            {"type": "image_url", "image_url": None, "uuid": ""},
            {"type": "image_url", "image_url": None, "uuid": 3},
            {"type": "image_url", "image_url": None, "uuid": "u" * 300},
            {"type": "image_url", "image_url": {"url": "x", "detail": "best"}},
            {"type": "image_url", "image_url": {"url": "x", "detail": ["low"]}},
            {"type": "video_url", "video_url": []},
        )
    ),
    *((said(temperature=wrong), "temperature") for wrong in (-0.1, 2.1, "1", [], True, 1e308)),
    (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', "temperature"),
    *((said(top_p=wrong), "top_p") for wrong in (0, 1.01, -1, "x")),
    *((said(top_k=wrong), "top_k") for wrong in (-2, 1.5, 2**31, "x")),
    *((said(seed=wrong), "seed") for wrong in (2**63, -(2**63) - 1, 0.5, "1")),
    *((said(n=wrong), "n") for wrong in (0, -1, 17, 1.0, "2", 10**30)),
    *((said(stop=wrong), "stop") for wrong in ("", [""], ["a"] * 5, [3], {"a": 1}, 5)),
    *((said(stop_token_ids=wrong), "stop_token_ids") for wrong in (3, [-1], [10**9], [0] * 65)),
    *((said(min_tokens=wrong), "min_tokens") for wrong in (-1, "3")),
    (said(min_tokens=5, max_tokens=4), "min_tokens"),
    *((said(ignore_eos=wrong), "ignore_eos") for wrong in (1, "true")),
    *((said(max_tokens=wrong), "max_tokens") for wrong in (0, -5, 1.5, "7", 2**70, True)),
    *((said(max_completion_tokens=wrong), "max_completion_tokens") for wrong in (0, "7")),
    (said(max_tokens=257), "input_tokens"),
    (said(max_tokens=2**62), "input_tokens"),
    (told([{"role": "user", "content": "word " * 300}]), "input_tokens"),
    (said(logprobs=3), "logprobs"),
    (said(top_logprobs=2), "top_logprobs"),
    (said(logprobs=True, top_logprobs=21), "top_logprobs"),
    *((said(presence_penalty=wrong), "presence_penalty") for wrong in (0.5, 3, "x")),
    (said(frequency_penalty=-1), "frequency_penalty"),
    (said(repetition_penalty=1.1), "repetition_penalty"),
    (said(logit_bias={"5": -100}), "logit_bias"),
    (said(min_p=0.1), "min_p"),
    (said(use_beam_search=True), "use_beam_search"),
    (said(bad_words=["x"]), "bad_words"),
    (said(allowed_token_ids=[5]), "allowed_token_ids"),
    (said(guided_choice=["yes", "no"]), "guided_choice"),
    (said(structured_outputs={"json": {}}), "structured_outputs"),
    (said(stream="yes"), "stream"),
    (said(stream_options={"include_usage": True}), "stream_options"),
    (said(stream=True, stream_options={"include_usage": "x"}), "stream_options"),
    *((said(response_format=wrong), "response_format") for wrong in ("text", {}, {"type": 3})),
    (said(response_format={"type": "json_object"}), "response_format"),
    (said(response_format={"type": "json_schema", "json_schema": {}}), "response_format"),
    (said(tools=[{"type": "function"}]), "tools"),
    (said(tools="x"), "tools"),
    (said(tool_choice="required"), "tool_choice"),
    (said(tool_choice={"type": "function"}), "tool_choice"),
    (said(media_io_kwargs={"video": {"duration": 3}}), "media_io_kwargs"),
    (said(media_io_kwargs={"image": {}}), "media_io_kwargs"),
    *(
        (said(media_io_kwargs={"video": {"num_frames": wrong}}), "media_io_kwargs")
        for wrong in (0, -2, 1.5, "x")
    ),
    *(
        (said(media_io_kwargs={"video": {"fps": wrong}}), "media_io_kwargs")
        for wrong in (0, -0.5, "x")
    ),
    (said(media_io_kwargs={"video": {"fps": 5}}).replace(b"5", b"1e999"), "media_io_kwargs"),
    (said(mm_processor_kwargs={"fps": 500_000}), "mm_processor_kwargs"),
    *((said(cache_salt=wrong), "cache_salt") for wrong in ("", "s" * 129, 3)),
    *((said(vision_tokens=wrong), "vision_tokens") for wrong in (576, 0, "1")),
]


@pytest.mark.parametrize("number", range(len(MALFORMED)))
def test_a_malformed_body_is_400(client: Client, number: int) -> None:
    body, param = MALFORMED[number]
    streamed = body.replace(b'"messages"', b'"stream": true, "messages"', 1)
    for raw in (body, streamed)[: 1 if param == "stream_options" else 2]:
        reply = client.send(CHAT, raw)
        assert reply.status == 400, (raw[:100], reply.body)
        assert (reply.error["type"], reply.error["param"]) == ("BadRequestError", param), reply.body
        assert len(reply.error["message"]) < 2500


def test_there_are_a_hundred_of_them() -> None:
    assert len(MALFORMED) >= 100


def test_messages_are_few_and_cut() -> None:
    wrong = {
        "messages": [3] * 50,
        "stop": "s" * 999,
        "temperature": "t" * 999,
        "tools": {str(n): 1 for n in range(5)},
    }
    with pytest.raises(ApiError) as caught:
        read(ChatFields, wrong, Limits())
    said = caught.value.message
    assert said.count("; ") == 10 and "and 42 more errors" in said
    assert shown("t" * 999) == f'"{"t" * 200}"...'
    assert shown([1] * 7) == "a list of 7" and shown({"a": "b"}) == "an object with 1 field"


def test_the_prompt_and_the_answer_must_fit(client: Client) -> None:
    usage = client.chat("hello", max_tokens=1).json["usage"]
    fits = 256 - usage["prompt_tokens"]
    full = client.chat("hello", max_tokens=fits, ignore_eos=True).json
    assert full["usage"]["total_tokens"] == 256
    error = client.chat("hello", max_tokens=fits + 1).error
    assert error["param"] == "input_tokens" and "maximum context length is 256" in error["message"]
    assert f"your prompt has {usage['prompt_tokens']}" in error["message"]
    open_end = client.chat("hello", ignore_eos=True).json
    assert open_end["choices"][0]["finish_reason"] == "length"
    assert open_end["usage"]["total_tokens"] == 256


def test_what_a_model_offers_is_taken(client: Client) -> None:
    assert client.said("hello", vision_tokens=1) == client.said("hello")
    assert client.said("hello", vision_tokens="all") == client.said("hello")
    told = client.chat("hello", vision_tokens=9).error["message"]
    assert "this model has 1 for an image and no other number" in told


def test_the_other_statuses(client: Client) -> None:
    missing = client.chat("hello", model="gpt-9").error
    assert (missing["type"], missing["param"]) == ("NotFoundError", "model")
    assert fake.NAME in missing["message"]
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert client.send(CHAT, said(), {"Content-Type": kind}).status == 400
    assert (
        client.send(CHAT, said(), {"Content-Type": "Application/JSON; charset=utf-8"}).status == 200
    )
    with running(fake.service(limits=Limits(body_bytes=2000))) as small:
        large = small.chat("x" * 3000)
        assert (large.status, large.error["type"]) == (413, "RequestTooLarge")
        assert small.chat("x").status == 200
        with socket.create_connection(("127.0.0.1", small.port), timeout=5) as raw:
            raw.sendall(
                f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                f"Content-Length: {10**12}\r\n\r\n".encode()
            )
            assert b" 413 " in raw.recv(1000)  # before any of it was sent


def test_a_server_that_is_not_ready_says_when_to_come_back() -> None:
    worker = fake.FakeWorker()
    service = fake.service(worker)
    with running(service) as client:
        worker.state = "starting"
        reply = client.chat("hello")
        assert (reply.status, reply.error["type"]) == (503, "ServiceUnavailableError")
        assert int(reply.headers["retry-after"]) >= 1
        assert client.send("/ready").status == 503 and client.send("/health").status == 200
        worker.kill()
        assert client.send("/ready").status == 503 and client.send("/health").status == 503
        assert client.chat("hello").status == 503


SECRETS = ("0x7f", "/secret", "BytesIO", "Error:", "Traceback", "engine.py")


def test_a_defect_says_nothing_and_ends_only_its_request(ruled: Client, caplog: Any) -> None:
    reply = ruled.chat("fail at once")
    assert (reply.status, reply.error["type"]) == (500, "InternalServerError")
    streamed = ruled.chat("fail at once", stream=True)
    assert streamed.status == 500 and streamed.error["message"] == reply.error["message"]
    assert not any(secret in (reply.body + streamed.body).decode() for secret in SECRETS)
    assert "lost" not in reply.error["message"]
    assert fake.DEFECT in caplog.text  # for the operator
    assert ruled.chat("hello").status == 200


def test_a_defect_in_a_stream_is_an_event(ruled: Client) -> None:
    *chunks, last = ruled.streamed("please fail")
    assert joined(chunks) and set(last) == {"error"}
    assert (last["error"]["code"], last["error"]["type"]) == (500, "InternalServerError")
    assert not any(secret in json.dumps(last) for secret in SECRETS)


@pytest.mark.parametrize(
    ("raw", "kept"),
    [
        ("cannot read <_io.BytesIO object at 0x7fab12> now", "cannot read ... now"),
        ("at 0x7fab1234", "at ..."),
        ("no /srv/x/y.py here", "no ... here"),
        ("in ~/models/a, ./b/c and ../d/e", "in ..., ... and ..."),
        ("a ValueError: bad", "a ... bad"),
        ("jax.errors.JaxRuntimeError: full", "... full"),
        ("x\nTraceback (most recent call last):\n File", "x ..."),
        ("see <class 'int'> and numpy.dtypes.X", "see ... and ..."),
        ('image/png, and/or 1/2, <image>, "</s>", /v1/chat/completions', None),
    ],
)
def test_nothing_of_the_machine_is_left_in_a_message(raw: str, kept: str | None) -> None:
    assert clean(raw) == (kept or raw)
    assert errors.of(InputError(raw)).body()["error"]["message"] == (kept or raw)
    assert clean("/a/" * 10**6)  # in no time


def test_numbers_of_json_alone_are_parsed() -> None:
    assert parse(b'{"a": 1e3, "b": -0.5}') == {"a": 1000.0, "b": -0.5}
