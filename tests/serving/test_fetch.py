"""Remote files come from public addresses of allowed hosts, and from nowhere else.

forbidden: a listener on 127.0.0.1 that nobody may reach
public: a server on 127.0.0.2, which these tests take for an address of the open internet
"""

import contextlib
import http.server
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from shutil import which
from typing import Any

import pytest

from llava_mini_jax.errors import InputError
from llava_mini_jax.serving import fetch
from llava_mini_jax.serving.errors import ApiError
from llava_mini_jax.serving.fetch import Fetcher, is_public, parse

PUBLIC = "127.0.0.2"
CONTENT = bytes(range(256)) * 1000


class Listener:
    """Counts who connects, and answers everything with a secret."""

    def __init__(self, address: str, port: int = 0):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.create_server((address, port), family=family)
        self.port, self.reached = self._socket.getsockname()[1], 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self.reached += 1
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecret")
                connection.close()

    def close(self) -> None:
        self._socket.close()


class Public(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    seen: list[Any]
    forbidden: int

    def do_GET(self) -> None:
        self.seen.append(self.headers)
        kind = self.path.strip("/").partition("?")[0].partition("/")[0]
        with contextlib.suppress(OSError):
            getattr(self, f"_{kind}", self._content)()
        self.close_connection = True

    def _start(self, status: int = 200, **headers: Any) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def _content(self) -> None:
        self._start(Content_Length=len(CONTENT))
        self.wfile.write(CONTENT)

    def _chunked(self) -> None:
        self._start(Transfer_Encoding="chunked")
        for at in range(0, len(CONTENT), 50_000):
            piece = CONTENT[at : at + 50_000]
            self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def _endless(self) -> None:
        self._start()
        while True:
            self.wfile.write(bytes(2**16))

    def _short(self) -> None:
        self._start(Content_Length=len(CONTENT) + 1)
        self.wfile.write(CONTENT)

    def _gzip(self) -> None:
        self._start(Content_Length=3, Content_Encoding="gzip")
        self.wfile.write(b"abc")

    def _redirect(self) -> None:
        self._start(302, Location=f"http://127.0.0.1:{self.forbidden}/", Content_Length=0)

    def _missing(self) -> None:
        self._start(404, Content_Length=0)

    def _broken(self) -> None:
        self._start(500, Content_Length=0)

    def _slow(self) -> None:
        self._start()
        for _ in range(200):
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.05)

    def _slow_header(self) -> None:
        for _ in range(200):
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.05)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def forbidden(monkeypatch) -> Iterator[Listener]:
    """Its port is the one that urls without a port name."""
    listener = Listener("127.0.0.1")
    monkeypatch.setitem(fetch._PORTS, "http", listener.port)
    monkeypatch.setitem(fetch._PORTS, "https", listener.port)
    others = []
    with contextlib.suppress(OSError):
        others.append(Listener("::1", listener.port))
    yield listener
    for each in (listener, *others):
        each.close()
    assert not listener.reached and not any(other.reached for other in others)


@pytest.fixture
def public(forbidden, monkeypatch) -> Iterator[http.server.ThreadingHTTPServer]:
    handler = type("Handler", (Public,), {"seen": [], "forbidden": forbidden.port})
    server = http.server.ThreadingHTTPServer((PUBLIC, forbidden.port), handler)
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(fetch, "is_public", lambda a: a == PUBLIC or is_public(a))
    yield server
    server.shutdown()
    server.server_close()


def row(address: str, port: int) -> tuple[Any, ...]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return family, socket.SOCK_STREAM, 6, "", (address, port)


class Names:
    """A resolver of names that exist nowhere; numbers of all kinds go to the system's."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.table: dict[str, list[list[str]]] = {
            "allowed.example": [[PUBLIC]],
            "loop.example": [["127.0.0.1"]],
            "loop6.example": [["::1"]],
            "mapped.example": [["::ffff:127.0.0.1"]],
            "mixed.example": [[PUBLIC, "127.0.0.1"]],
            "mixed6.example": [[PUBLIC, "::1"]],
            "rebind.example": [[PUBLIC], ["127.0.0.1"], ["127.0.0.1"]],
            "zone.example": [["fe80::1%lo"]],
            "nothing.example": [[]],
        }

    def __call__(self, host: str, port: int, **options: Any) -> list[tuple[Any, ...]]:
        self.asked.append(host)
        if host in self.table:
            turns = self.table[host]
            return [row(address, port) for address in (turns.pop(0) if turns[1:] else turns[0])]
        if any(letter in "ghijklmnopqrstuvwyz" for letter in host) and host != "localhost":
            raise socket.gaierror(-2, "Name or service not known")
        return socket.getaddrinfo(host, port, **options)


def get(url: str, *hosts: str, names: Any = None, seconds: float = 5.0, most: int = 10**6) -> bytes:
    fetcher = Fetcher(hosts or ["*"], resolve=names or Names())
    return fetcher.fetch(url, seconds=seconds, most=most, name="image 1", param="image_url")


def refused(url: str, *hosts: str, **options: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        get(url, *hosts, **options)
    assert caught.value.param == "image_url"
    return caught.value


INSIDE = (
    *("127.0.0.1", "localhost", "LOCALHOST", "localhost.", "127.0.0.1.", "127.1", "127.0.1", "0"),
    *("0.0.0.0", "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1", "017700000001"),
    *("127.0.0.1%00", "127.0.0.1%2f", "%31%32%37.0.0.1", "１２７.０.０.１", "①②⑦.0.0.1"),
    *("127。0。0。1", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]"),
    *("[0:0:0:0:0:ffff:127.0.0.1]", "[64:ff9b::127.0.0.1]", "[64:ff9b::7f00:1]"),
    *("[2002:7f00:1::]", "[2001:0:7f00:1::]", "[fe80::1]", "[fe80::1%25lo]", "[::1%25lo]"),
    *("[fd00:ec2::254]", "[fec0::1]", "[ff02::1]", "169.254.169.254", "10.0.0.1", "172.16.0.1"),
    *("192.168.0.1", "100.64.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "198.18.0.1"),
    *("user@127.0.0.1", "user:word@127.0.0.1", "allowed.example@127.0.0.1"),
    *("allowed.example:80@127.0.0.1", "allowed.example\\@127.0.0.1"),
    *("127.0.0.1\\@allowed.example", "allowed.example%2f@127.0.0.1", "@127.0.0.1"),
    *("127.0.0.1 allowed.example", "127.0.0.1\tallowed.example", "127.0.0.1\r\nHost: x"),
    *("loop.example", "loop6.example", "mapped.example", "mixed.example", "mixed6.example"),
    *("zone.example", "nothing.example", "unknown.example", "allowed.example/redirect"),
)
WRITTEN = (
    *("http:127.0.0.1", "http:/127.0.0.1/", "http:///127.0.0.1/", "//127.0.0.1/", "127.0.0.1"),
    *("ftp://127.0.0.1/", "gopher://127.0.0.1/", "dict://127.0.0.1/", "unix:///x", "HTTPS+x://a/"),
    *("http://", "http://?", "http://#@127.0.0.1", "http://[::1", "http://[127.0.0.1]/", ""),
    *("http://127.0.0.1:x/", "http://127.0.0.1:99999/", "http://127.0.0.1:-1/", "http://a..b/"),
    *("http://user@allowed.example/", "http://a:b@allowed.example/", "http://@allowed.example/"),
    *("http://allowed%2eexample/", "http://allowed.example\\/", "http://allowed.example/a b"),
    *("http://127.0.0.1/\0", "http://\u202e127.0.0.1/", " http://127.0.0.1/", "http://127.0.0.1/ "),
)


@pytest.mark.parametrize("scheme", ["http", "https", "HtTp"])
@pytest.mark.parametrize("host", INSIDE)
def test_no_form_of_an_inner_address_is_reached(forbidden, public, scheme, host):
    for url in (f"{scheme}://{host}", f"{scheme}://{host}/a.png?b#c"):
        for hosts in (["*"], ["allowed.example"]):
            error = refused(url, *hosts, seconds=2.0)
            assert error.status in (400, 422)
            assert "127" not in error.message and "0x" not in error.message
    refused(f"{scheme}://{host.partition('/')[0]}:{forbidden.port + 1}/")


@pytest.mark.parametrize("url", WRITTEN)
def test_what_is_no_url_is_none(forbidden, public, url):
    assert refused(url).status in (400, 422)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "allowed.example.evil.example", "notallowed.example", "allowed.example:81"],
)
def test_other_hosts_are_not_even_looked_up(public, host):
    names = Names()
    error = refused(f"http://{host}/", "allowed.example", names=names)
    assert error.status == 400 and not names.asked
    assert "does not fetch from" in error.message


def test_a_second_answer_of_the_resolver_is_never_asked_for(public):
    names = Names()
    assert get("http://rebind.example/", names=names) == CONTENT
    assert names.asked == ["rebind.example"]


@pytest.mark.parametrize("path", ["", "/", "/a b".replace(" ", "%20"), "/chunked", "?x=1"])
@pytest.mark.parametrize("host", ["allowed.example", "ALLOWED.example", "allowed.example."])
def test_an_allowed_host_is_fetched_from(public, host, path):
    assert get(f"http://{host}{path}", "Allowed.Example.") == CONTENT
    (headers,) = public.RequestHandlerClass.seen
    assert headers["Host"] == "allowed.example"
    assert {"cookie", "authorization"}.isdisjoint(map(str.lower, headers))


def test_a_port_is_allowed_where_it_is_listed(public, monkeypatch):
    port = public.server_address[1]
    monkeypatch.setitem(fetch._PORTS, "http", 80)
    assert get(f"http://allowed.example:{port}/", f"allowed.example:{port}") == CONTENT
    (headers,) = public.RequestHandlerClass.seen
    assert headers["Host"] == f"allowed.example:{port}"
    assert refused(f"http://allowed.example:{port}/", "allowed.example", "*").status == 400


def test_proxies_are_not_asked(forbidden, public, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{forbidden.port}")
    assert get("http://allowed.example/") == CONTENT


def test_failures_are_all_the_same_sentence(forbidden, public, monkeypatch):
    closed = socket.create_server((PUBLIC, 0))
    port = closed.getsockname()[1]
    closed.close()
    hosts = ["*", f"allowed.example:{port}"]
    paths = ("missing", "broken", "redirect", "gzip", "short")
    urls = [f"http://allowed.example/{path}" for path in paths]
    urls += [f"http://{name}.example/" for name in ("loop", "mixed", "unknown", "nothing", "zone")]
    urls += [f"http://allowed.example:{port}/", "http://127.0.0.1/", "http://10.0.0.1/"]
    told = {(error.status, error.message) for error in (refused(url, *hosts) for url in urls)}
    assert told == {(422, "image 1 could not be fetched from its url")}


@pytest.mark.parametrize("path", ["", "chunked", "endless"])
def test_bytes_are_counted(public, path):
    error = refused(f"http://allowed.example/{path}", most=100_000)
    assert error.status == 400 and "100,000 bytes" in error.message
    assert get("http://allowed.example/", most=len(CONTENT)) == CONTENT


@pytest.mark.parametrize("path", ["slow", "slow_header"])
def test_time_is_limited_in_all(public, path):
    began = time.monotonic()
    assert refused(f"http://allowed.example/{path}", seconds=0.5).status == 422
    assert time.monotonic() - began < 8  # to its end it takes ten seconds


def test_a_resolver_that_hangs_is_given_up(forbidden):
    given_up = threading.Event()
    error = refused("http://a.example/", names=lambda *_, **__: given_up.wait(60), seconds=0.3)
    assert error.status == 422 and not given_up.is_set()
    given_up.set()


@pytest.mark.skipif(which("openssl") is None, reason="makes its certificates with openssl")
@pytest.mark.parametrize(("name", "works"), [("allowed.example", True), ("other.example", False)])
def test_certificates_are_those_of_the_name(forbidden, public, monkeypatch, tmp_path, name, works):
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -keyout key.pem -out cert.pem"
        f" -subj /CN={name} -addext subjectAltName=DNS:{name}"
    )
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    asked: list[Any] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    context.sni_callback = lambda _, name, __: asked.append(name)
    public.socket = context.wrap_socket(public.socket, server_side=True)
    default = ssl.create_default_context
    monkeypatch.setattr(
        ssl, "create_default_context", lambda: default(cafile=str(tmp_path / "cert.pem"))
    )
    if works:
        assert get("https://allowed.example/") == CONTENT
    else:
        assert refused("https://allowed.example/").status == 422
    assert asked == ["allowed.example"]


@pytest.mark.parametrize("host", ["", "http://a.example", "a/b", "a.example:x", "a:b:c", "a:99999"])
def test_a_wrong_list_is_refused(host):
    with pytest.raises(InputError, match="allowed host"):
        Fetcher([host])


def test_public_addresses():
    assert all(map(is_public, ["93.184.216.34", "8.8.8.8", "2606:2800:220:1::1"]))
    for address in (
        *("0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "169.254.169.254", "172.16.0.1"),
        *("192.0.0.1", "192.0.2.1", "192.168.0.1", "198.18.0.1", "224.0.0.251", "239.1.2.3"),
        *("240.0.0.1", "255.255.255.255", "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1"),
        *("::ffff:8.8.8.8", "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1", "100::1"),
        *("2001::7f00:1", "2001:db8::1", "2002:7f00:1::1", "fc00::1", "fd00:ec2::254", "fe80::1"),
        *("fec0::1", "ff02::1", "ff0e::1"),
    ):
        assert not is_public(address), address
    assert parse("http://a.example").target == "/"
