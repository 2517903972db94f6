"""Keys, tenants, web pages of others, slow connections, and what the log holds."""

import contextlib
import logging
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.serving import connection, keys
from tests.serving import fake
from tests.serving.running import Client, running, wait_until

PATHS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", f"/v1/models/{fake.NAME}"),
    ("GET", "/version"),
    ("GET", "/load"),
    ("GET", "/metrics"),
    ("GET", "/nothing/here"),
    ("PUT", "/v1/models"),
    ("GET", "//health"),
    ("GET", "/health/"),
    ("GET", "/HEALTH"),
    ("GET", "/%68ealth/../v1/models"),
]
KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def guarded() -> Any:
    digests = frozenset(map(keys.digest, KEYS))
    with running(fake.service(keys=digests, origins=("https://a.example",))) as client:
        yield client


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_every_path_needs_a_key(guarded: Client, method: str, path: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "prompt": "x"}
    asked = dict(body=body if method == "POST" else None, method=method)
    for wrong in (
        *({}, {"Authorization": ""}, {"Authorization": "Bearer"}, {"Authorization": "Bearer  "}),
        *({"Authorization": "Bearer third-key"}, {"Authorization": "Basic first-key"}),
        *({"Authorization": "first-key"}, {"Authorization": "Bearer first-key,second-key"}),
        *({"Authorization": "Bearer first-ke"}, {"Authorization": "Bearer \xff\xfe"}),
    ):
        reply = guarded.send(path, headers=wrong, **asked)
        assert (reply.status, reply.error["type"]) == (401, "AuthenticationError"), wrong
        assert reply.headers["www-authenticate"] == "Bearer"
    for right in ("Bearer first-key", "bearer second-key", "BEARER   first-key"):
        assert guarded.send(path, headers={"Authorization": right}, **asked).status != 401


def test_probes_need_none(guarded: Client) -> None:
    assert guarded.send("/health").status == 200 and guarded.send("/ready").status == 200
    with running(fake.service(keys=frozenset({keys.digest("k")}), open_metrics=True)) as client:
        assert client.send("/metrics").status == 200


def test_a_browser_may_ask_from_the_allowed_origin_alone(guarded: Client) -> None:
    def allowed(origin: str, method: str, **more: str) -> str | None:
        headers = {"Origin": origin, **more}
        reply = guarded.send("/v1/models", headers=headers, method=method)
        return reply.headers.get("access-control-allow-origin")

    asks = {"Access-Control-Request-Method": "GET"}
    assert allowed("https://a.example", "OPTIONS", **asks) == "https://a.example"
    assert allowed("https://b.example", "OPTIONS", **asks) is None
    assert allowed("https://a.example", "GET") == "https://a.example"  # 401, which it may read
    with running(fake.service()) as client:
        reply = client.send("/health", headers={"Origin": "https://a.example"})
        assert "access-control-allow-origin" not in reply.headers


def test_tenants_are_keys_and_salts() -> None:
    tenants: list[str] = []

    class Worker(fake.FakeWorker):
        def submit(self, request: Any, listener: Any) -> Any:
            tenants.append(request.tenant)
            return super().submit(request, listener)

    with running(fake.service(Worker(), keys=frozenset(map(keys.digest, KEYS)))) as client:
        for key, salt in ((0, None), (0, None), (1, None), (0, "s"), (1, "s")):
            Client(client.port, KEYS[key]).chat("x", cache_salt=salt)
    assert tenants[0] == tenants[1] and len(set(tenants)) == 4
    assert not any(key in tenant for key in KEYS for tenant in tenants)


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "keys"
    file.write_text("a1\n\n  b2 \n")
    monkeypatch.delenv(keys.VARIABLE, raising=False)
    assert keys.read_keys(None) == frozenset()
    assert keys.read_keys(file) == {keys.digest("a1"), keys.digest("b2")}
    monkeypatch.setenv(keys.VARIABLE, "c3, d4")
    assert keys.read_keys(file) == set(map(keys.digest, ("a1", "b2", "c3", "d4")))
    for wrong in (" , ", "", "two words"):
        monkeypatch.setenv(keys.VARIABLE, wrong)
        with pytest.raises(InputError, match="key"):
            keys.read_keys(None)
    monkeypatch.delenv(keys.VARIABLE)
    file.write_text("\n")
    for path in (file, tmp_path / "none"):
        with pytest.raises(InputError, match="--api-key-file"):
            keys.read_keys(path)


def test_slow_heads_and_bodies_end(monkeypatch: Any) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.4)
    monkeypatch.setattr(connection, "SPARE", 0.2)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with running(fake.service(body_timeout=0.4)) as client:

        def dripped(start: bytes, drops: bytes) -> tuple[bytes, float]:
            """(what comes back, seconds until the end) of a client that sends byte by byte."""
            began = time.monotonic()
            with socket.create_connection(("127.0.0.1", client.port), timeout=5) as slow:
                slow.sendall(start)
                slow.settimeout(0.1)
                back = b""
                for drop in drops:
                    try:
                        slow.sendall(bytes([drop]))
                        more = slow.recv(4096)
                    except TimeoutError:
                        continue
                    except OSError:
                        break
                    back += more
                    if not more:
                        break
                return back, time.monotonic() - began

        back, seconds = dripped(b"", head + b"X: " + b"y" * 100)
        assert back == b"" and seconds < 8
        back, seconds = dripped(head + b"Content-Length: 99\r\n\r\n", b'{"a": "' + b"b" * 100)
        assert b" 408 " in back and b"RequestTimeoutError" in back and seconds < 8
        asked = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        back, seconds = dripped(asked, b"GET /health HTTP/1.1\r\nX: " + b"y" * 100)
        assert back.count(b"HTTP/1.1 200") == 1 and seconds < 8
        assert client.chat("others go on").status == 200


def test_what_is_no_http_is_told_in_the_same_shape(client: Client) -> None:
    for garbage in (b"\x16\x03\x01garbage\r\n\r\n", b"GET / HTTX/1.1\r\n\r\n", b"G\x00T /\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", client.port), timeout=5) as raw:
            raw.sendall(garbage)
            back = raw.makefile("rb").read()
        assert back.startswith(b"HTTP/1.1 400 ") and b'{"error":{"message":"' in back
    headers = {f"X-{n}": "v" * 8000 for n in range(100)}
    with contextlib.suppress(OSError):  # it may end while the client still sends
        assert client.send("/health", headers=headers).status in (400, 431)
    assert client.send("/health").status == 200


def test_the_log_has_no_prompts_keys_or_queries(guarded: Client, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    Client(guarded.port, KEYS[0]).chat("my-secret-prompt")
    guarded.send("/v1/models?token=my-query", headers={"Authorization": "Bearer my-wrong-key"})
    guarded.send("/no\u001b/my-path".replace("\u001b", "%1b"))
    wait_until(lambda: "401" in caplog.text)
    assert "POST /v1/chat/completions 200" in caplog.text
    for secret in ("my-secret-prompt", "my-query", "my-wrong-key", KEYS[0], "my-path", "\x1b"):
        assert secret not in caplog.text
