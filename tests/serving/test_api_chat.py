"""Chats over HTTP: answers, streams, choices, ends, log probabilities, usage."""

import itertools
import json
import random
from typing import Any

from tests.serving import fake
from tests.serving.running import Client, events, joined, running

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
WORDS = (
    "hello",
    "is",
    "hé",
    "日本語",
    "😀",
    "👩‍👩‍👧",
    "a\nb",
    "  two",
    "ﬁ",
    "x" * 30,
    "</s>",
    "<image>",
)


def prompts(count: int) -> list[str]:
    chosen = random.Random(5)
    return [" ".join(chosen.choices(WORDS, k=chosen.randint(1, 6))) for _ in range(count)]


def test_an_answer_has_the_whole_shape(client: Client) -> None:
    reply = client.chat("hello", max_tokens=3)
    told = reply.json
    assert reply.status == 200 and reply.headers["content-type"] == "application/json"
    assert told["id"].startswith("chatcmpl-") and len(told["id"]) == len("chatcmpl-") + 32
    assert (told["object"], told["model"]) == ("chat.completion", fake.NAME)
    (choice,) = told["choices"]
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"]
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, "length")
    usage = told["usage"]
    assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]
    details = usage["prompt_tokens_details"]
    assert details["text_tokens"] + details["image_tokens"] == usage["prompt_tokens"]
    assert set(details) == {"cached_tokens", "image_tokens", "text_tokens"}
    assert told["system_fingerprint"] == "fp_test" and "metrics" not in told


def test_streamed_pieces_are_the_whole_text(client: Client) -> None:
    for text in prompts(100):
        assert joined(client.streamed(text)) == client.said(text), text


def test_a_stream_is_what_clients_read(client: Client) -> None:
    whole = client.chat("hello", max_tokens=8).json
    options = {"include_usage": True}
    reply = client.chat("hello", max_tokens=8, stream=True, stream_options=options)
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"
    *chunks, last = events(reply.body)
    for name in ("id", "created", "model", "object"):
        assert len({chunk[name] for chunk in [*chunks, last]}) == 1
    assert last["object"] == "chat.completion.chunk" and last["choices"] == []
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert all(last["usage"][name] == whole["usage"][name] for name in counts)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    ends = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert ends == [None] * (len(chunks) - 1) + [whole["choices"][0]["finish_reason"]]
    assert len(chunks) > 4  # it did not come in one piece


def test_usage_comes_only_when_asked_and_continuously_on_demand(client: Client) -> None:
    assert all("usage" not in chunk for chunk in client.streamed("hello"))
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = client.streamed("hello", stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == last["usage"]["completion_tokens"]
    assert counts[0] == 1


def test_choices_have_seeds_of_their_own_and_share_a_prompt(client: Client) -> None:
    asked = dict(n=3, temperature=1, seed=7)
    told = client.chat("three", **asked).json
    texts = [choice["message"]["content"] for choice in told["choices"]]
    assert len(set(texts)) == 3 and [c["index"] for c in told["choices"]] == [0, 1, 2]
    chunks = client.streamed("three", **asked)
    assert [joined(chunks, index) for index in range(3)] == texts
    alone = client.chat("three", temperature=1, seed=7).json
    assert alone["choices"][0]["message"]["content"] == texts[0]
    assert alone["usage"]["prompt_tokens"] == told["usage"]["prompt_tokens"]
    assert told["usage"]["completion_tokens"] > alone["usage"]["completion_tokens"]


def test_zero_temperature_and_a_seed_repeat_themselves(client: Client) -> None:
    assert client.said("again") == client.said("again")
    for seed in (0, 12, -3, 2**63 - 1, -(2**63)):
        first, second = (client.said("again", temperature=1, seed=seed) for _ in range(2))
        assert first == second
    assert client.said("again", temperature=1, seed=2**32) != client.said(
        "again", temperature=1, seed=0
    )
    assert len({client.said("again", temperature=1) for _ in range(4)}) > 1


def test_a_stop_string_is_never_shown(client: Client) -> None:
    short = dict(max_tokens=16)
    whole = client.said("one two three four", **short)
    assert len(whole) > 12
    for start, size in itertools.product(range(0, len(whole) - 6, 3), (1, 2, 6)):
        stop = whole[start : start + size]
        expected = whole[: whole.index(stop)].strip()
        told = client.chat("one two three four", stop=stop, **short).json["choices"][0]
        assert (told["message"]["content"], told["finish_reason"]) == (expected, "stop"), stop
        assert told["stop_reason"] == stop
        chunks = client.streamed("one two three four", stop=[stop, "-"], **short)
        assert joined(chunks) == expected
        assert chunks[-1]["choices"][0]["stop_reason"] in (stop, "-")
    told = client.chat("one two three four", **short).json["choices"][0]
    assert told["stop_reason"] is None


def test_both_names_of_the_limit(client: Client) -> None:
    def ended(**fields: Any) -> tuple[int, str]:
        told = client.chat("hello there", **fields).json
        return told["usage"]["completion_tokens"], told["choices"][0]["finish_reason"]

    assert ended(max_tokens=3) == (3, "length")
    assert ended(max_completion_tokens=4, max_tokens=3) == (4, "length")
    assert ended(max_tokens=60, ignore_eos=True, stop=None) == (60, "length")
    chunks = client.streamed(
        "hello", max_tokens=40, ignore_eos=True, stream_options={"include_usage": True}
    )
    assert chunks[-1]["usage"]["completion_tokens"] == 40


def test_ends_of_other_kinds(ruled: Client) -> None:
    def told(**fields: Any) -> tuple[str, int]:
        answer = ruled.chat("a, b, c", **fields).json
        return answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]

    whole, count = told()
    assert told(min_tokens=count + 5)[1] >= count + 5
    comma = fake.model().tokenizer.convert_tokens_to_ids(",")
    assert told(stop_token_ids=[comma])[0] == whole.partition(",")[0]
    chosen = ruled.chat("a, b, c", stop_token_ids=[comma], stop=["zzz"]).json["choices"][0]
    assert (chosen["finish_reason"], chosen["stop_reason"]) == ("stop", comma)
    assert told(stop_token_ids=[comma], ignore_eos=True, max_tokens=50)[1] < 50


def test_log_probabilities(client: Client) -> None:
    asked = dict(logprobs=True, top_logprobs=2, max_tokens=30)
    told = client.chat("hé 😀", **asked).json
    content = told["choices"][0]["logprobs"]["content"]
    assert len(content) == told["usage"]["completion_tokens"]
    assert all(bytes(entry["bytes"]).decode(errors="replace") for entry in content)
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert all(-9999 <= top["logprob"] <= 0 for entry in content for top in entry["top_logprobs"])
    # Greedy: none is likelier than the one that is said.
    assert all(entry["top_logprobs"][0]["logprob"] == entry["logprob"] for entry in content)
    chunks = client.streamed("hé 😀", **asked)
    parts = [c["choices"][0]["logprobs"] for c in chunks]
    assert [entry for part in parts if part for entry in part["content"]] == content


def test_bytes_of_tokens_spell_the_text(ruled: Client) -> None:
    told = ruled.chat("hé 😀", logprobs=True).json["choices"][0]
    spelt = bytes(byte for entry in told["logprobs"]["content"] for byte in entry["bytes"])
    assert spelt.decode().strip() == told["message"]["content"]
    names = [entry["token"] for entry in told["logprobs"]["content"]]
    assert "bytes:\\xf0" in names and "You" in names


def test_what_was_asked_for_can_be_measured(client: Client) -> None:
    told = client.chat("hello", include_metrics=True).json["metrics"]
    assert told["time_to_first_token_ms"] > 0 and told["tokens_per_second"] > 0
    chunk = client.streamed("hello", include_metrics=True)[-1]
    assert chunk["choices"] == [] and set(chunk["metrics"]) == set(told) and "usage" not in chunk


def test_media_stand_where_their_parts_stand() -> None:
    reader = fake.FakeReader()
    with running(fake.service(reader=reader)) as client:
        video = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,BBBB"}}
        content = ["see", PICTURE, {"type": "text", "text": "then"}, video, "end"]
        asked = {"messages": [{"role": "user", "content": content}], "temperature": 0}
        asked["media_io_kwargs"] = {"video": {"num_frames": 5}}
        told = client.send("/v1/chat/completions", asked).json
        assert [type(part).__name__ for part in reader.read_parts] == ["ImagePart", "VideoPart"]
        assert told["usage"]["prompt_tokens_details"]["image_tokens"] == 6
        text = told["choices"][0]["message"]["content"]
        assert text.startswith("You say: see\n\nthen\n\nend") and b"AAAA".hex() in text


def test_frames_that_come_as_pictures_are_a_film_by_the_models_name() -> None:
    reader = fake.FakeReader()
    with running(fake.service(reader=reader)) as client:

        def ask(name: str, content: Any) -> Any:
            asked = {"messages": [{"role": "user", "content": content}], "model": name}
            return client.send("/v1/chat/completions", asked)

        name = f"{fake.NAME}:frames-as-video"
        told = ask(name, [PICTURE] * 40 + ["what?", PICTURE, PICTURE]).json
        assert told["model"] == name and len(reader.read_parts) == 42
        assert told["usage"]["prompt_tokens_details"]["image_tokens"] == 42
        # Two marks, each on its line, as two films have them.
        films = ask(fake.NAME, [PICTURE, "what?", PICTURE]).json["usage"]["prompt_tokens_details"]
        assert told["usage"]["prompt_tokens_details"]["text_tokens"] == films["text_tokens"]
        apart = ask(fake.NAME, [PICTURE] * 40 + ["what?"]).json["usage"]["prompt_tokens_details"]
        assert apart["text_tokens"] > films["text_tokens"]  # a new line behind each
        read = len(reader.read_parts)
        assert ask(name, [PICTURE] * 300).error["param"] == "input_tokens"
        film = {"type": "video_url", "video_url": {"url": "data:,"}}
        assert ask(name, [film]).error["param"] == "video_url"
        assert len(reader.read_parts) == read


def test_completions_are_text_alone(client: Client) -> None:
    def ask(**fields: Any) -> Any:
        asked = {"prompt": "<image> </s> hi", "temperature": 0, **fields}
        return client.send("/v1/completions", asked)

    told = ask().json
    (choice,) = told["choices"]
    assert told["id"].startswith("cmpl-") and told["object"] == "text_completion"
    assert choice["text"] and told["usage"]["completion_tokens"] <= 16
    chunks = events(ask(stream=True).body)
    assert "".join(c["choices"][0]["text"] for c in chunks) == choice["text"]
    many = ask(prompt=["a", "b"], n=2, logprobs=1).json
    assert [c["index"] for c in many["choices"]] == [0, 1, 2, 3]
    logprobs = many["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) > 0
    assert ask(prompt=[]).status == 400 and ask(echo=True).error["param"] == "echo"


def test_every_small_path(client: Client) -> None:
    listed = client.send("/v1/models").json
    assert listed["object"] == "list" and listed["data"][0]["id"] == fake.NAME
    assert listed["data"][0]["max_model_len"] == 256
    assert client.send(f"/v1/models/{fake.NAME}").json == listed["data"][0]
    assert client.send("/v1/models/other/name").error["param"] == "model"
    assert (client.send("/health").status, client.send("/health").body) == (200, b"")
    assert client.send("/ready").status == 200
    assert client.send("/version").json["version"]
    assert client.send("/load").json == {"server_load": 0}
    for path in ("/v1/responses", "/tokenize", "/v1/chat/completions/", "/%2e%2e/etc/passwd"):
        assert client.send(path, {}).error["type"] == "NotFoundError"
    assert client.send("/v1/chat/completions").error["type"] == "MethodNotAllowedError"
    assert client.send("/v1/chat/completions").headers["allow"] == "POST"


def test_ids_of_requests_are_given_back(client: Client) -> None:
    given = {"X-Request-Id": "a-b.c:1"}
    assert client.send("/health", headers=given).headers["x-request-id"] == "a-b.c:1"
    made = client.send("/health", headers={"X-Request-Id": "a b\tc" * 99}).headers["x-request-id"]
    assert made.isalnum() and len(made) == 32


def test_unknown_fields_and_null_are_nothing(client: Client) -> None:
    more: dict[str, Any] = {
        **{"user": "u", "session_id": 4, "service_tier": None, "parallel_tool_calls": True},
        **{"reasoning_effort": "low", "metadata": {"a": [1]}, "store": False, "priority": 3},
        **{"tools": None, "tool_choice": "none", "response_format": {"type": "text"}, "stop": None},
        **{"n": None, "seed": None, "top_p": None, "max_tokens": None, "presence_penalty": 0.0},
    }
    assert client.said("hello", **more) == client.said("hello")
    assert json.loads(client.chat("hello", model="").body)["model"] == fake.NAME
