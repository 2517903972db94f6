"""As many tokens of an image as a chat asks for: what the engine is asked, and what is refused."""

from pathlib import Path

import pytest

import llava_mini_jax
from llava_mini_jax import Model, cli
from llava_mini_jax.inference.lanes import LaneSize
from llava_mini_jax.inference.ticket import Request
from llava_mini_jax.inference.worker import Worker
from llava_mini_jax.serving import asking
from llava_mini_jax.serving.errors import ApiError
from llava_mini_jax.serving.fields import ChatFields, read
from llava_mini_jax.serving.limits import Limits
from llava_mini_jax.serving.media import MediaReader
from llava_mini_jax.serving.messages import conversation
from llava_mini_jax.serving.parts import VideoOptions
from tests import tiny_model
from tests.serving import fake
from tests.serving.load.process import served
from tests.serving.running import running, wait_until
from tests.serving.test_media import data, picture, saved
from tests.weights import test_methods_folders

COUNTS = (0, 1, 4, 9, 16)


@pytest.fixture(scope="module")
def model() -> Model:
    return llava_mini_jax.load(tiny_model.folder("nested"))


def messages(pictures: int) -> list[dict]:
    shown = {"type": "image_url", "image_url": {"url": data(saved(picture()))}}
    return [{"role": "user", "content": [shown] * pictures + [{"type": "text", "text": "what?"}]}]


def asked(model: Model, context: int = 256, pictures: int = 1, **fields) -> Request:
    found = read(ChatFields, {"messages": messages(pictures), **fields}, Limits())
    said = conversation(found.messages)
    media = MediaReader(model.bundle, Limits()).read(said.media, VideoOptions(), "")
    tokens = asking.chosen_tokens(found, model.bundle)
    prompt = asking.chat_prompt(said, model, context, tokens)
    (request,) = asking.requests(prompt, media, found, model, context, asking.Defaults(), "")
    return request


def test_the_engine_is_asked_for_the_requests_own_count(model: Model) -> None:
    assert asked(model).example.tokens is None
    for count in COUNTS:
        assert asked(model, vision_tokens=count).example.tokens == count
    assert asked(model, vision_tokens="all").example.tokens == 16


def test_the_arithmetic_is_that_of_the_count(model: Model) -> None:
    text = len(asked(model, vision_tokens=0).example.ids) - 1
    room = text + 2 * 9 + 5
    limits = {n: asked(model, room, 2, vision_tokens=n).settings.max_new_tokens for n in (0, 9)}
    # A second mark is a token, and the newline behind it one, too.
    assert limits[0] - limits[9] == 18
    with pytest.raises(ApiError, match=r"your prompt has \d+"):
        asked(model, room, 2, vision_tokens=16)


@pytest.mark.parametrize("wrong", [5, -1, 576])
def test_another_count_is_refused_with_those_that_there_are(model: Model, wrong: int) -> None:
    with pytest.raises(ApiError, match="this model has 0, 1, 4, 9, 16 for an image") as told:
        asked(model, vision_tokens=wrong)
    assert told.value.param == "vision_tokens"
    with pytest.raises(ApiError) as told:
        asked(model, vision_tokens="auto")
    assert told.value.param == "vision_tokens"


@pytest.mark.slow  # compiles an engine's programs
def test_a_server_answers_each_chat_with_its_count(model: Model) -> None:
    worker = Worker(model, [LaneSize(4, 256)])
    with running(fake.service(worker, MediaReader(model.bundle, Limits()))) as client:
        wait_until(lambda: worker.state != "starting", 600)

        def ask(**fields):
            body = {"messages": messages(1), "temperature": 0, "max_tokens": 8, **fields}
            return client.send("/v1/chat/completions", body)

        used, said = [], []
        for count in COUNTS:
            reply = ask(vision_tokens=count).json
            used.append(reply["usage"]["prompt_tokens"])
            said.append(reply["choices"][0]["message"]["content"])
        assert [used[n] - used[0] for n in range(5)] == list(COUNTS)
        unasked = ask().json
        assert unasked["usage"]["prompt_tokens"] - used[0] == 1
        assert unasked["choices"][0]["message"]["content"] == said[1]
        error = ask(vision_tokens=5).error
        assert error["param"] == "vision_tokens" and "0, 1, 4, 9, 16" in error["message"]


@pytest.mark.slow  # a server of its own
def test_serve_has_a_number_for_chats_that_ask_for_none() -> None:
    options = ("--vision-tokens", "9", "--slots", "1", "--lengths", "128")
    with served(str(tiny_model.folder("nested")), *options) as server:
        taken = {}
        for count in (None, 0, 4):
            fields = {} if count is None else {"vision_tokens": count}
            body = {"messages": messages(1), "max_tokens": 1, **fields}
            reply = server.client.send("/v1/chat/completions", body)
            assert reply.status == 200, reply.body
            taken[count] = reply.json["usage"]["prompt_tokens"]
        assert (taken[None] - taken[0], taken[4] - taken[0]) == (9, 4)


@pytest.mark.slow  # a server of its own
def test_serve_has_a_method_that_needs_no_training(tmp_path: Path) -> None:
    options = ("--compressor", "fastv,layer=1,keep=8,variant=drop", "--slots", "1")
    folder = test_methods_folders.llava(tmp_path, max_position_embeddings=512)
    with served(str(folder), *options) as server:
        body = {"messages": messages(1), "max_tokens": 4, "ignore_eos": True}
        reply = server.client.send("/v1/chat/completions", body)
        assert reply.status == 200 and reply.json["usage"]["completion_tokens"] == 4, reply.body
        video = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
        body["messages"] = [{"role": "user", "content": [video, {"type": "text", "text": "what?"}]}]
        refused = server.client.send("/v1/chat/completions", body)
        assert refused.status == 400 and "fastv" in refused.error["message"]


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--vision-tokens", "3", "this model has 0, 1, 4, 9, 16 for an image"),
        ("--compressor", "fastv,layer=1,keep=8", "fastv"),
    ],
)
def test_serve_refuses_what_the_model_has_not(option: str, value: str, told: str, capsys) -> None:
    folder = str(tiny_model.folder("nested"))
    assert cli.main(["serve", folder, "--port", "0", option, value]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1
