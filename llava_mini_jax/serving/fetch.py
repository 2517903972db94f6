"""Remote files for requests: from hosts that the operator named, and from nowhere else.

    url --parse, once--> scheme, host, port, target --on the list?--> resolve, once
        --every address public?--> connect to one of those --GET, counted, timed--> bytes

A url makes this machine ask on behalf of a stranger, so whatever it could reach inside (the cloud's
metadata, a database, another user's port) must be out of reach, and answers must not tell what is
there. All failures behind the list of hosts are therefore one sentence. Redirects, proxies and
cookies do not exist; http.client rather than a richer client, because it talks over whatever
connection it is given.
"""

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from llava_mini_jax.errors import InputError
from llava_mini_jax.serving.errors import ApiError

ANY_HOST = "*"
_PORTS = {"http": 80, "https": 443}
_URL = re.compile(r"[!-\[\]-~]+")  # printable ASCII but for space and backslash
_ADDRESSES = 2  # of a host that are tried
_BLOCK = 2**16
_HEADERS = {"Accept-Encoding": "identity", "Connection": "close", "User-Agent": "llava-mini"}
_TARGET = ipaddress.ip_network("2000::/3")  # all that has been given out of IPv6
# Whatever is in these stands for an IPv4 address, which may be an inner one.
_TUNNELS = [ipaddress.ip_network(text) for text in ("2001::/23", "2002::/16")]
Resolve = Callable[..., Sequence[tuple[Any, ...]]]  # socket.getaddrinfo


@dataclass(frozen=True)
class Place:
    """A url, taken apart; nothing reads its text again."""

    scheme: str
    host: str
    port: int
    target: str  # path and query


class Fetcher:
    """Files from a list of hosts: "images.org", "images.org:8443", or "*" for every public one.

    A host without a port is one with its scheme's own. Raises InputError for a wrong list.
    """

    def __init__(self, hosts: Sequence[str], *, resolve: Resolve | None = None):
        self._hosts = {_listed(host) for host in hosts}
        self._resolve = resolve or socket.getaddrinfo

    def fetch(self, url: str, *, seconds: float, most: int, name: str, param: str) -> bytes:
        """The content, of at most `most` bytes, within `seconds` in all.

        Raises ApiError, about `name`: 400 for a url that is not allowed, 422 for anything else.
        """
        place = self._allowed(url, name, param)
        failed = ApiError(422, f"{name} could not be fetched from its url", param=param)
        deadline = time.monotonic() + seconds
        try:
            found = self._addresses(place, deadline)
        except (OSError, ValueError, TimeoutError):
            raise failed from None
        for family, address in found[:_ADDRESSES]:
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                content = _get(place, family, address, deadline, most)
                if content is None:
                    raise ApiError(
                        400, f"{name} has more than {most:,} bytes; make it smaller", param=param
                    )
                return content
        raise failed

    def _allowed(self, url: str, name: str, param: str) -> Place:
        try:
            place = parse(url)
        except ValueError:
            raise ApiError(422, f"the url of {name} is malformed", param=param) from None
        usual = place.port == _PORTS[place.scheme]
        own = place.host if usual else f"{place.host}:{place.port}"
        if own not in self._hosts and not (usual and ANY_HOST in self._hosts):
            raise ApiError(
                400,
                f"the url of {name} names a host that this server does not fetch from; send the"
                " content as a data: url",
                param=param,
            )
        return place

    def _addresses(self, place: Place, deadline: float) -> list[tuple[int, Any]]:
        """(family, address) of the host; ValueError unless every one of them is public."""
        found = _within(
            lambda: self._resolve(place.host, place.port, type=socket.SOCK_STREAM), deadline
        )
        addresses = [(family, address) for family, _, _, _, address in found]
        if not addresses or not all(is_public(str(address[0])) for _, address in addresses):
            raise ValueError("an address is not public")
        return addresses


def parse(url: str) -> Place:
    """The parts of an http(s) url; ValueError for one that two readers might read differently."""
    if not _URL.fullmatch(url):
        raise ValueError("it has characters that no url has")
    parts = urlsplit(url)
    scheme, host = parts.scheme.lower(), (parts.hostname or "").lower()
    if scheme not in _PORTS or "@" in parts.netloc or "%" in parts.netloc or not host:
        raise ValueError("it is not a plain http(s) url")
    port = _PORTS[scheme] if parts.port is None else parts.port
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Place(scheme, _plain(host), port, target)


def _plain(host: str) -> str:
    """Lower case, IDNA, without a dot at its end."""
    text = host.lower().removesuffix(".")
    try:
        ipaddress.IPv6Address(text)
        return text
    except ValueError:
        pass
    if ":" in text:
        raise ValueError("its host is not a name")
    return text.encode("idna").decode("ascii") if text else text


def _listed(entry: str) -> str:
    host, colon, port = entry.strip().rpartition(":") if ":" in entry else (entry.strip(), "", "")
    try:
        plain = host if host == ANY_HOST else _plain(host)
        if not plain or "/" in plain or (colon and not 0 < int(port) < 2**16):
            raise ValueError("no host")
    except ValueError as error:
        raise InputError(
            f"the allowed host {entry!r:.80} is not a host name; give names such as images.org,"
            f" images.org:8443, or {ANY_HOST} for every public host"
        ) from error
    return f"{plain}{colon}{port}"


def is_public(address: str) -> bool:
    """Whether an address is one of the open internet, and stands for no other."""
    found = ipaddress.ip_address(address)  # ValueError for one with a zone, which is local
    if found.is_multicast or not found.is_global:
        return False
    if isinstance(found, ipaddress.IPv4Address):
        return True
    return found in _TARGET and not any(found in network for network in _TUNNELS)


# --- One connection -------------------------------------------------------------------------------


def _get(place: Place, family: int, address: Any, deadline: float, most: int) -> bytes | None:
    """The content; None if it is more than `most` bytes; OSError, HTTPException for all else."""
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        sock.settimeout(_left(deadline))
        sock.connect(address)
        if place.scheme == "https":
            context = ssl.create_default_context()
            sock = stack.enter_context(
                context.wrap_socket(sock, server_hostname=place.host, do_handshake_on_connect=False)
            )
        stack.enter_context(_closed_at(sock, deadline))
        if isinstance(sock, ssl.SSLSocket):
            sock.do_handshake()
        connection = http.client.HTTPConnection(_authority(place), timeout=_left(deadline))
        connection.auto_open = 0  # never a second connection, to wherever
        connection.sock = sock
        connection.request("GET", place.target, headers=_HEADERS)
        content = _content(connection.getresponse(), most)
        _left(deadline)  # what ends because it was closed looks whole
        return content


def _authority(place: Place) -> str:
    host = f"[{place.host}]" if ":" in place.host else place.host
    return host if place.port == _PORTS[place.scheme] else f"{host}:{place.port}"


def _content(response: http.client.HTTPResponse, most: int) -> bytes | None:
    encoding = response.getheader("Content-Encoding", "identity").strip().lower()
    if response.status != 200 or encoding not in ("identity", ""):
        raise http.client.HTTPException("no plain answer")
    content = bytearray()
    while block := response.read(_BLOCK):
        content += block
        if len(content) > most:
            return None
    if response.length:  # what the header said beyond what came
        raise http.client.HTTPException("it ends early")
    return bytes(content)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


@contextlib.contextmanager
def _closed_at(sock: socket.socket, deadline: float) -> Iterator[None]:
    """Ends a connection at the deadline: who sends a byte now and then would pass any timeout."""

    def close() -> None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)

    timer = threading.Timer(_left(deadline), close)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _within(work: Callable[[], Any], deadline: float) -> Any:
    """What `work` returns, or TimeoutError: the system's resolver knows no deadline."""
    done: Future = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except Exception as error:  # is raised where it is waited for
            done.set_exception(error)

    threading.Thread(target=run, name="resolve", daemon=True).start()
    return done.result(_left(deadline))
