"""Downloading images from addresses that nobody vouches for.

Bounded in every direction: time for the whole answer (not only between two bytes), size, redirects, retries, requests
per host. Names are resolved once and the connection goes to the very address that was checked, so that a name cannot
point to a private one in between. ``X-Robots-Tag`` is honoured.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import ipaddress
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urljoin, urlsplit

from data_prep.options import FetchOptions
from data_prep.prepare import Task
from data_prep.record import Inline, Rejected

FORBIDDEN = {"noai", "noimageai", "noindex", "noimageindex", "none"}
"""Words in X-Robots-Tag that keep an image out."""
VALUED = {"max-snippet", "max-image-preview", "max-video-preview", "unavailable_after"}
"""Words in X-Robots-Tag that a colon follows; another word before a colon is the agent that is addressed."""
HASHES = {32: "md5", 40: "sha1", 64: "sha256"}
"""Length in hex digits of an expected hash."""
_PIECE = 64 * 1024
_FRAME = 1024**2
"""Bytes of an answer that may come beside its body: headers, lengths of chunks."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_UNICAST = ipaddress.ip_network("2000::/3")
"""All that IPv6 has of public addresses; ``is_global`` also says so of site-local and of NAT64's local ones."""


@dataclass(frozen=True, slots=True)
class Remote:
    """An image to be downloaded."""

    url: str
    expected: str = ""
    """Its hash in hex: MD5, SHA-1 or SHA-256, told apart by the length."""

    def read(self) -> bytes:
        """Where downloading is not asked for; otherwise it was done before."""
        raise Rejected("a URL: build with `sluice prep build urls` to download it")


class _Again(Exception):
    """Worth another attempt."""


class _Wire(io.RawIOBase):
    """A socket to read from until a deadline, and at most so many bytes: http.client trusts what chunks promise."""

    def __init__(self, sock: socket.socket, deadline: float, most: int) -> None:
        self._sock = sock
        self._deadline = deadline
        self._left = most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no time left")
        self._sock.settimeout(left)
        n = self._sock.recv_into(buffer)
        self._left -= n
        if self._left < 0:
            raise Rejected("an answer without end")
        return n


class _Socket:
    """What http.client uses of a socket, with limits for reading."""

    def __init__(self, sock: socket.socket, deadline: float, most: int) -> None:
        self._sock = sock
        self._deadline = deadline
        self._most = most

    def sendall(self, data: bytes) -> None:
        self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Wire(self._sock, self._deadline, self._most), _PIECE)

    def close(self) -> None:
        """Do nothing: http.client closes it while its answer is still to be read."""


class Fetcher:
    """Downloads; used by many threads at once."""

    def __init__(self, options: FetchOptions) -> None:
        self.options = options
        self._tls = ssl.create_default_context()
        self._next: dict[str, float] = {}
        self._lock = threading.Lock()

    def get(self, remote: Remote) -> bytes:
        """The image's bytes.

        Raises:
            Rejected: it cannot or should not be had.
        """
        o = self.options
        reason: object = ""
        for attempt in range(o.retries + 1):
            if attempt:
                time.sleep(o.backoff * 2 ** (attempt - 1))
            try:
                data = self._follow(remote.url)
                break
            # http.client lets some nonsense of servers through to where it is a ValueError.
            except (_Again, OSError, http.client.HTTPException, ValueError) as error:
                reason = error if str(error) else type(error).__name__
        else:
            raise Rejected(f"download failed after {o.retries + 1} attempts: {reason}")
        if remote.expected:
            self._compare(data, remote.expected.strip().lower())
        return data

    def _compare(self, data: bytes, expected: str) -> None:
        kind = HASHES.get(len(expected))
        if kind is None:
            raise Rejected(f"expected hash {expected!r} is neither MD5, SHA-1 nor SHA-256")
        if hashlib.new(kind, data, usedforsecurity=False).hexdigest() != expected:
            raise Rejected(f"download has another {kind} than expected")

    def _follow(self, url: str) -> bytes:
        left = self.options.timeout
        for _ in range(self.options.redirects + 1):
            answer, left = self._request(url, left)
            if isinstance(answer, bytes):
                return answer
            try:
                url = urljoin(url, answer)
            except ValueError as error:
                raise Rejected(f"redirected to what is not a URL: {error}") from error
        raise Rejected(f"more than {self.options.redirects} redirects")

    def _request(self, url: str, left: float) -> tuple[bytes | str, float]:
        """The body, or where else to look, and how many of the seconds ``left`` remain."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise Rejected(f"not a URL: {error}") from error
        if parts.scheme not in ("http", "https") or not host:
            raise Rejected(f"not an HTTP address: {url[:200]}")
        self._wait_turn(host)
        deadline = time.monotonic() + left
        secure = parts.scheme == "https"
        connection = http.client.HTTPConnection(host, port or (443 if secure else 80))
        raw = self._connect(host, connection.port, secure, deadline)
        connection.sock = _Socket(raw, deadline, self.options.max_bytes + _FRAME)
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            path = path.encode("utf-8", "replace").decode("latin-1")
            path = "".join(c if "!" <= c <= "~" else f"%{ord(c):02X}" for c in path)
            headers = {"User-Agent": self.options.agent, "Accept": "image/*", "Accept-Encoding": "identity"}
            connection.request("GET", path, headers={**headers, "Connection": "close"})
            with connection.getresponse() as answer:
                return self._read(answer), deadline - time.monotonic()
        finally:
            connection.close()
            raw.close()

    def _connect(self, host: str, port: int, secure: bool, deadline: float) -> socket.socket:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, ValueError) as error:
            if isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN:  # a name server has much to do
                raise _Again(f"{host!r}: {error}") from error
            raise Rejected(f"unknown host {host!r}: {error}") from error
        addresses = [entry[4] for entry in found]
        if not self.options.private:
            for address in addresses:
                if not _public(str(address[0])):
                    raise Rejected(f"{host} is at {address[0]}, a private address")
        raw = self._first(addresses, port, deadline)
        return self._tls.wrap_socket(raw, server_hostname=host) if secure else raw

    def _first(self, addresses: Sequence[tuple[Any, ...]], port: int, deadline: float) -> socket.socket:
        """A connection to the first address that takes one; each may take an even part of the time left."""
        for number, address in enumerate(addresses):
            left = (deadline - time.monotonic()) / (len(addresses) - number)
            try:
                return socket.create_connection((str(address[0]), port), timeout=max(0.001, left))
            except OSError:
                if number == len(addresses) - 1:
                    raise
        raise AssertionError("a name without addresses is unknown")

    def _read(self, answer: http.client.HTTPResponse) -> bytes | str:
        if answer.status in (301, 302, 303, 307, 308):
            place = answer.getheader("Location")
            if not place:
                raise Rejected(f"HTTP {answer.status} without a place to go")
            return place
        if answer.status == 429 or answer.status >= 500:
            raise _Again(f"HTTP {answer.status}")
        if answer.status != 200:
            raise Rejected(f"HTTP {answer.status}")
        if self.options.robots:
            self._check_robots(answer.headers.get_all("X-Robots-Tag") or [])
        kind = (answer.getheader("Content-Type") or "").partition(";")[0].strip().lower()
        if kind.startswith("text/"):
            raise Rejected(f"answers with {kind}, no image")
        promised = answer.length
        if promised is not None and promised > self.options.max_bytes:
            raise Rejected(f"{promised} bytes, most is {self.options.max_bytes}")
        pieces: list[bytes] = []
        size = 0
        while piece := answer.read(_PIECE):
            pieces.append(piece)
            size += len(piece)
            if size > self.options.max_bytes:
                raise Rejected(f"more than {self.options.max_bytes} bytes")
        if promised is not None and size < promised:
            raise _Again(f"broke off after {size} of {promised} bytes")
        return b"".join(pieces)

    def _check_robots(self, tags: list[str]) -> None:
        for tag in tags:
            agent, colon, rest = tag.partition(":")
            addressed = bool(colon) and "," not in agent and agent.strip().lower() not in VALUED
            if addressed and agent.strip().lower() not in (self.options.agent.lower(), "*"):
                continue
            if {word.strip().lower() for word in (rest if addressed else tag).split(",")} & FORBIDDEN:
                raise Rejected(f"X-Robots-Tag: {tag}")

    def _wait_turn(self, host: str) -> None:
        """Space out the requests to one host; waiting is no part of a request's time."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next.get(host, 0.0))
            self._next[host] = turn + 1 / self.options.per_host
        time.sleep(max(0.0, turn - now))


def _public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        # What a router or the system may turn into an IPv4 address is judged as that one.
        embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None
        inner = ip.ipv4_mapped or ip.sixtofour or embedded
        if inner is not None:
            return _public(str(inner))
        return ip.is_global and ip in _UNICAST
    return ip.is_global and not ip.is_multicast


@dataclass(frozen=True, slots=True)
class Failed:
    """An image that could not be had."""

    reason: str

    def read(self) -> bytes:
        """Say why."""
        raise Rejected(self.reason)


def fetched(
    tasks: Iterable[Task], options: FetchOptions, get: Callable[[Remote], bytes] | None = None
) -> Iterator[Task]:
    """The tasks in order, with what is remote downloaded ahead by many threads."""
    get = get or Fetcher(options).get

    def load(task: Task) -> Task:
        place, split, record = task
        assert isinstance(record.image, Remote)
        try:
            return place, split, replace(record, image=Inline(get(record.image)))
        except Rejected as reason:
            return place, split, replace(record, image=Failed(str(reason)))

    pool = ThreadPoolExecutor(options.concurrency)
    flying: deque[Task | Future[Task]] = deque()
    try:
        for task in tasks:
            flying.append(pool.submit(load, task) if isinstance(task[2].image, Remote) else task)
            while flying and (len(flying) > 4 * options.concurrency or not isinstance(flying[0], Future)):
                yield _done(flying.popleft())
        while flying:
            yield _done(flying.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _done(task: Task | Future[Task]) -> Task:
    return task.result() if isinstance(task, Future) else task
