"""One exchange with an OpenAI-compatible server, and what its response says.

    body, key --POST--> status, headers, JSON without the key --> text_of | said | retry_after

The key is read from an environment variable; it is in no field of `Endpoint`, no message and no
result, and is cut out of responses that repeat it. The standard library is enough: what is needed
beyond it (a limit for the whole exchange, however slowly its bytes come, and no redirects, which
would take the key elsewhere) is not what HTTP libraries do by themselves.
"""

import base64
import dataclasses
import email.utils
import http.client
import json
import os
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from llava_mini_jax.errors import InputError

_LARGEST = 2**23  # bytes of a response that are read
_SECRET = 8  # characters from which on a key is one; servers of one's own take "EMPTY" and the like


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A server and how it is treated. Raises InputError for what is no usable address or number."""

    base_url: str  # such as "https://api.openai.com/v1" or "http://localhost:8000/v1"
    key_variable: str | None = "OPENAI_API_KEY"  # the environment variable with the key; or none
    concurrency: int = 8
    timeout_s: float = 120.0  # of one exchange, from connecting to its last byte
    tries: int = 6  # of one request
    first_wait_s: float = 1.0  # before the second try; doubled for each further one
    longest_wait_s: float = 120.0  # a server that asks for more is left for another time
    owner: str = "the judge"  # whose server it is, for messages

    def __post_init__(self) -> None:
        try:
            url = urllib.parse.urlsplit(self.base_url)
            good = url.scheme in ("http", "https") and bool(url.hostname) and (url.port or 1) > 0
        except ValueError:
            url, good = None, False
        if url is None or not good or "@" in url.netloc or url.query or url.fragment:
            # The address is not repeated: it may hold a key.
            raise InputError(
                f"{self.owner}'s base URL is not usable; expected"
                " http(s)://HOST[:PORT]/PATH without user, password or query, and the key in an"
                " environment variable"
            )
        for name in ("concurrency", "tries", "timeout_s", "first_wait_s", "longest_wait_s"):
            if not getattr(self, name) > 0:
                raise InputError(
                    f"{self.owner}'s {name} is {getattr(self, name)}; give more than 0"
                )


def exchange(
    endpoint: Endpoint, content: bytes | None, key: str | None, path: str = "/chat/completions"
) -> tuple[int, Mapping[str, str], Any]:
    """(status, headers, parsed response or None) of one POST, or of a GET without `content`.

    It ends in time whatever happens.

    Raises OSError or http.client.HTTPException where there is no whole response.
    """
    url = urllib.parse.urlsplit(endpoint.base_url.rstrip("/") + path)
    connection, target, headers = _connection(url, endpoint.timeout_s)
    method = "GET" if content is None else "POST"
    if content is not None:
        headers["Content-Type"] = "application/json"
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    began = time.monotonic()
    try:
        connection.connect()
        left = max(0.01, endpoint.timeout_s - (time.monotonic() - began))
        # The socket's own time-out is for silence; this one is for bytes that come one by one.
        timer = threading.Timer(left, _cut, [connection.sock])
        timer.daemon = True
        timer.start()
        try:
            connection.request(method, target, content, headers)
            response = connection.getresponse()
            data = _without(_json(response.read(_LARGEST)), key)
            return response.status, dict(response.headers.items()), data
        finally:
            timer.cancel()
    finally:
        connection.close()


def _connection(
    url: urllib.parse.SplitResult, timeout: float
) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
    """(connection, path, headers) to a server, through the proxy that the environment names."""
    host, headers = url.hostname or "", {}
    name = urllib.request.getproxies().get(url.scheme)
    proxy = None
    if name and not urllib.request.proxy_bypass(host):
        proxy = urllib.parse.urlsplit(name if "://" in name else f"//{name}")
        if proxy.username:
            pair = f"{proxy.username}:{proxy.password or ''}"
            user = base64.b64encode(urllib.parse.unquote(pair).encode()).decode()
            headers["Proxy-Authorization"] = f"Basic {user}"
    at = proxy or url
    if url.scheme == "https":
        secure = http.client.HTTPSConnection(at.hostname or "", at.port, timeout=timeout)
        if proxy is not None:
            secure.set_tunnel(host, url.port, headers)
        return secure, url.path, {}
    plain = http.client.HTTPConnection(at.hostname or "", at.port, timeout=timeout)
    return plain, url.geturl() if proxy is not None else url.path, headers


def _cut(opened: socket.socket) -> None:
    with suppress(OSError):  # it may be closed already
        opened.shutdown(socket.SHUT_RDWR)


def read_key(endpoint: Endpoint) -> str | None:
    if endpoint.key_variable is None:
        return None
    key = os.environ.get(endpoint.key_variable, "").strip()
    if not key:
        raise InputError(
            f"the environment variable {endpoint.key_variable} is not set; put the key of"
            f" {endpoint.owner} there"
        )
    if len(key) >= _SECRET and key in endpoint.base_url:
        raise InputError(
            f"{endpoint.owner}'s base URL holds the key; keys are sent in a header, not there"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise InputError(
            f"the environment variable {endpoint.key_variable} holds no key: expected printable"
            " ASCII without blanks"
        )
    return key


def _without(value: Any, key: str | None) -> Any:
    """A parsed response without the key, wherever in it the server repeats it."""
    if key is None or len(key) < _SECRET:
        return value
    if isinstance(value, str):
        return value.replace(key, "[key]")
    if isinstance(value, list):
        return [_without(one, key) for one in value]
    if isinstance(value, dict):
        return {_without(k, key): _without(v, key) for k, v in value.items()}
    return value


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def text_of(data: Any) -> str | None:
    """What a chat completion says; "" for a refusal, None if it is no chat completion."""
    try:
        said = data["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        # A refusal may come without any content.
        with suppress(KeyError, IndexError, TypeError):
            return "" if isinstance(data["choices"][0]["message"]["refusal"], str) else None
        return None
    if isinstance(said, list):
        said = "".join(p["text"] for p in said if isinstance(p, dict) and "text" in p)
    return said if isinstance(said, str) else "" if said is None else None


def said(status: int, data: Any) -> str:
    """An error's status, with the code and the first words that the server gives for it."""
    error = data.get("error") if isinstance(data, dict) else None
    if isinstance(error, dict):
        parts = [str(error[name]) for name in ("code", "message") if error.get(name)]
        return f"status {status}: {'; '.join(parts)[:200]}"
    return f"status {status}" + (" without a chat completion" if status == 200 else "")


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait; 0 if it does not say, or not in a way that is known."""
    lower = {name.lower(): value for name, value in headers.items()}
    with suppress(KeyError, ValueError):  # OpenAI's own, finer than the standard's seconds or date
        return max(0.0, float(lower["retry-after-ms"]) / 1000)
    value = lower.get("retry-after", "")
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0
