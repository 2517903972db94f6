"""The judge's key: it goes to the server that it belongs to, and nowhere else."""

import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.judge import client
from llava_mini_jax.evaluation.judge.http import Endpoint
from tests.evaluation.judge_server import KEY, completion, endpoint, number, plan, texts_of


def test_redirects_do_not_take_the_key_elsewhere(serve, tmp_path):
    other = serve(lambda handler, body, nth: handler.give(200, completion("ok")))
    server = serve(
        lambda handler, body, nth: handler.give(307, b"", Location=f"{other.url}/chat/completions")
    )
    replies = client.ask(plan(2), endpoint(server), tmp_path / "r.jsonl")
    assert set(replies.pending.values()) == {"status 307"} and not other.keys


def test_the_key_is_in_nothing_that_is_left_behind(serve, tmp_path, capfd, caplog):
    caplog.set_level(0)

    def echo(handler, body, nth):
        n = number(body)
        sent = handler.headers["Authorization"]
        if n % 4 == 0:
            handler.give(400, {"error": {"message": f"bad {sent}", "code": sent}})
        elif n % 4 == 1:
            handler.give(500, {"error": sent, sent: [sent]})
        elif n % 4 == 2:
            handler.give(200, b"not json " + sent.encode())
        else:
            handler.give(200, {**completion(f"8 7 {sent}", note=[{sent: sent}]), "model": sent})

    server, file = serve(echo), tmp_path / "out" / "replies.jsonl"
    settings = endpoint(server)
    replies = client.ask(plan(9), settings, file)
    assert len(replies.by_key) == 2 + 3 and len(replies.pending) == 4  # three are refused
    assert server.keys == {f"Bearer {KEY}"}
    assert texts_of(replies)["item3"] == ["8 7 Bearer [key]"]
    left = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    out = capfd.readouterr()
    everything = [repr(settings), repr(replies), str(replies.about()), caplog.text, *out]
    assert len(left) == 2 and all(KEY.encode() not in content for content in left)
    assert all(KEY not in text for text in everything)


@pytest.mark.parametrize("key", ["sk-two\nlines-of-key", "sk-with blank-12345", "sk-ключ-12345"])
def test_keys_that_cannot_be_sent_are_not_shown(key, serve, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server = serve(lambda handler, body, nth: handler.give(200, completion("ok")))
    with pytest.raises(InputError, match="OPENAI_API_KEY holds no key") as caught:
        client.ask(plan(1), endpoint(server), tmp_path / "r.jsonl")
    assert "sk-" not in str(caught.value) and caught.value.__cause__ is None


def test_keys_that_are_missing_or_in_the_address(serve, tmp_path, monkeypatch):
    server = serve(lambda handler, body, nth: handler.give(200, completion("ok")))
    monkeypatch.setenv("MY_KEY", "")
    with pytest.raises(InputError, match="MY_KEY is not set"):
        client.ask(plan(1), endpoint(server, key_variable="MY_KEY"), tmp_path / "r")
    client.ask(plan(1), endpoint(server, key_variable=None), tmp_path / "r.jsonl")
    assert server.keys == {None}
    for url in (f"http://u:{KEY}@h/v1", f"http://h/v1?key={KEY}", f"ftp://{KEY}", KEY, "http://"):
        with pytest.raises(InputError, match="base URL") as caught:
            Endpoint(base_url=url)
        assert KEY not in str(caught.value)
    with pytest.raises(InputError, match="base URL holds the key") as caught:
        client.ask(plan(1), Endpoint(base_url=f"http://h/{KEY}"), tmp_path / "r")
    assert KEY not in str(caught.value)
