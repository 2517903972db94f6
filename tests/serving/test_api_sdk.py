"""OpenAI's own client in front of the server."""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest

from llava_mini_jax.serving import keys
from tests.serving import fake
from tests.serving.running import Client, running, wait_until
from tests.serving.test_api_load import long_one, opened

openai = pytest.importorskip("openai")

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/p"
    "LvAAAAAElFTkSuQmCC"
)
ASKED: Any = [{"role": "user", "content": "hello there"}]
PICTURE = {"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}}


@contextlib.contextmanager
def sdk(client: Client, key: str = "any", retries: int = 0) -> Iterator[Any]:
    url = f"http://127.0.0.1:{client.port}/v1"
    with openai.OpenAI(base_url=url, api_key=key, max_retries=retries, timeout=30) as made:
        yield made


@pytest.fixture
def ask(client: Client) -> Iterator[Any]:
    with sdk(client) as made:
        yield made


def test_models(ask: Any) -> None:
    (model,) = ask.models.list().data
    assert model.id == fake.NAME and ask.models.retrieve(fake.NAME).id == fake.NAME
    with pytest.raises(openai.NotFoundError):
        ask.models.retrieve("other")


def test_chats(ask: Any, client: Client) -> None:
    content: Any = [PICTURE, {"type": "text", "text": "what is this?"}]
    told = ask.chat.completions.create(
        model=fake.NAME, messages=[{"role": "user", "content": content}], temperature=0
    )
    assert told.choices[0].message.content and told.usage.prompt_tokens_details.image_tokens == 1
    three = ask.chat.completions.create(
        model=fake.NAME, messages=ASKED, n=3, temperature=1, logprobs=True, top_logprobs=2
    )
    assert len({choice.message.content for choice in three.choices}) == 3
    assert len(three.choices[0].logprobs.content[0].top_logprobs) == 2
    extra = {"ignore_eos": True, "min_tokens": 3, "vision_tokens": 1, "session_id": "s"}
    exact = ask.chat.completions.create(
        model=fake.NAME, messages=ASKED, max_completion_tokens=9, extra_body=extra
    )
    assert exact.usage.completion_tokens == 9 and exact.choices[0].finish_reason == "length"


def test_streams(ask: Any, client: Client) -> None:
    stream = ask.chat.completions.create(
        model=fake.NAME,
        messages=ASKED,
        stream=True,
        temperature=0,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == client.said("hello there") and chunks[-1].usage.total_tokens > 0


def test_an_error_in_a_stream_is_an_exception(ruled: Client) -> None:
    messages: Any = [{"role": "user", "content": "please fail"}]
    with sdk(ruled) as ask:
        stream = ask.chat.completions.create(model=fake.NAME, messages=messages, stream=True)
        with pytest.raises(openai.APIError, match="failed to answer"):
            list(stream)


def test_errors_have_the_exception_of_their_status(ask: Any, client: Client) -> None:
    create = ask.chat.completions.create
    with pytest.raises(openai.BadRequestError) as bad:
        create(model=fake.NAME, messages=ASKED, temperature=3)
    assert bad.value.param == "temperature" and "temperature is 3" in bad.value.message
    with pytest.raises(openai.NotFoundError):
        create(model="other", messages=ASKED)
    with (
        running(fake.service(keys=frozenset({keys.digest("right")}))) as guarded,
        sdk(guarded, "wrong") as wrong,
        sdk(guarded, "right") as right,
    ):
        with pytest.raises(openai.AuthenticationError, match="API key is not known"):
            wrong.models.list()
        assert right.models.list().data


def test_a_full_queue_is_tried_again() -> None:
    service = fake.service(fake.FakeWorker(slots=1, pace=0.01), max_queued=1)
    with running(service) as client, sdk(client, retries=3) as patient:
        held = opened(client, **long_one(max_tokens=40))
        wait_until(lambda: service.admission.held == 1)
        began = time.monotonic()
        told = patient.chat.completions.create(model=fake.NAME, messages=ASKED)
        assert told.choices[0].message.content
        assert time.monotonic() - began > 0.9  # as Retry-After said
        held.close()


def test_a_stream_that_is_closed_frees_its_slot() -> None:
    worker = fake.FakeWorker(pace=0.02)
    with running(fake.service(worker)) as client, sdk(client) as made:
        stream = made.chat.completions.create(
            model=fake.NAME, messages=ASKED, stream=True, max_tokens=200,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        next(iter(stream))
        assert worker.counts().running == 1
        stream.close()
        wait_until(lambda: worker.counts().running == 0, 2)


def test_the_asynchronous_client(client: Client) -> None:
    async def asked() -> list[str]:
        url = f"http://127.0.0.1:{client.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="any") as made:
            told = await asyncio.gather(
                *(made.chat.completions.create(model="", messages=ASKED) for _ in range(8))
            )
            completion = await made.completions.create(model=fake.NAME, prompt="hi", max_tokens=4)
        return [one.choices[0].message.content for one in told] + [completion.choices[0].text]

    assert all(asyncio.run(asked()))
