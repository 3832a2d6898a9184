"""Downloading from a server that answers slowly, wrongly, endlessly, and elsewhere."""

import hashlib
import socket
import threading
import time
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import fetch
from data_prep.build import build
from data_prep.fetch import Fetcher, Remote
from data_prep.options import FetchOptions, Options
from data_prep.record import Inline, Record, Rejected
from data_prep.sources.table import Columns, TableSource
from tests.unit.data_prep.samples import members, png
from tests.unit.data_prep.test_build import lines

IMAGE = png(1)
QUICK = FetchOptions(timeout=60, max_bytes=20_000, retries=2, backoff=0.01, per_host=1000, private=True)
HASTY = replace(QUICK, timeout=0.4)
CAREFUL = Fetcher(replace(HASTY, private=False, retries=0, per_host=1e9))


class Handler(BaseHTTPRequestHandler):
    """What the path says."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        """Quiet."""

    def do_GET(self):
        self.server.seen[self.path] += 1
        getattr(self, self.path.split("/")[1].split("?")[0], self.missing)()

    def answer(self, body=IMAGE, status=200, length=None, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if length != -1:
            self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def missing(self):
        self.answer(b"", 404)

    def image(self):
        self.answer(Content_Type="image/png")

    def slow_start(self):
        self.server.stop.wait(5)

    def drip_header(self):
        self.drip(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 400)

    def drip_body(self):
        self.drip(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + b"y" * 500, 50)

    def drip(self, data, at_once=0):
        try:
            self.wfile.write(data[:at_once])
            for i in range(at_once, len(data)):
                self.wfile.write(data[i : i + 1])
                if self.server.stop.wait(0.02):
                    return
        except OSError:
            pass
        self.close_connection = True

    def endless(self):
        self.send_response(200)
        self.end_headers()
        try:
            while not self.server.stop.is_set():
                self.wfile.write(b"x" * 4096)
        except OSError:
            pass
        self.close_connection = True

    def huge(self):
        self.answer(b"x", length=10**9)

    def truncated(self):
        self.answer(IMAGE[:100], length=len(IMAGE))

    def chunked_truncated(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"100\r\nabc")
        self.close_connection = True

    def negative_chunk(self):
        self.chunk(b"-5\r\nabc")

    def endless_chunk(self):
        """A length of -1 makes http.client read all there is to come."""
        try:
            self.chunk(b"-1\r\n")
            while not self.server.stop.is_set():
                self.wfile.write(b"x" * 65536)
        except OSError:
            pass

    def chunk(self, body):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def html(self):
        self.answer(b"<html>", Content_Type="text/html; charset=utf-8")

    def disguised_html(self):
        self.answer(b"<html>" * 50, Content_Type="image/png")

    def error(self):
        self.answer(b"", 503)

    def flaky(self):
        self.error() if self.server.seen[self.path] < 3 else self.image()

    def elsewhere(self):
        self.answer(b"", 302, Location="/image")

    def loop(self):
        self.answer(b"", 302, Location="/loop")

    def slow_loop(self):
        self.server.stop.wait(0.3)
        self.answer(b"", 302, Location="/slow_loop")

    def nowhere(self):
        self.answer(b"", 302)

    def private(self):
        self.answer(b"", 301, Location=f"http://127.0.0.2:{self.server.server_port}/image")

    def broken(self):
        self.answer(b"", 302, Location="http://[::1/image")

    def file(self):
        self.answer(b"", 302, Location="file:///etc/passwd")

    def noai(self):
        self.answer(X_Robots_Tag="noai")

    def nonsense(self):
        self.wfile.write(b"\x00\xff nonsense\r\n\r\n")
        self.close_connection = True

    def hangup(self):
        self.close_connection = True


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.seen, server.stop = Counter(), threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()
    thread.join()


def url(server, path):
    return f"http://127.0.0.1:{server.server_port}/{path}"


@pytest.mark.parametrize("path", ["image", "image?a=b c&\u00e4", "elsewhere", "flaky"])
def test_good(server, path):
    server.seen.clear()
    assert Fetcher(QUICK).get(Remote(url(server, path))) == IMAGE


@pytest.mark.parametrize(
    ("path", "reason", "attempts"),
    [
        ("slow_start", "failed after 3 attempts", 3),
        ("drip_header", "failed after 3 attempts", 3),
        ("drip_body", "failed after 3 attempts", 3),
        ("endless", "more than 20000 bytes", 1),
        ("huge", "1000000000 bytes, most is 20000", 1),
        ("truncated", "broke off after 100 of", 3),
        ("chunked_truncated", "IncompleteRead", 3),
        ("negative_chunk", "failed after 3 attempts", 3),
        ("endless_chunk", "an answer without end", 1),
        ("html", "text/html", 1),
        ("missing", "HTTP 404", 1),
        ("error", "HTTP 503", 3),
        ("loop", "more than 5 redirects", 6),
        ("nowhere", "without a place", 1),
        ("file", "not an HTTP address", 1),
        ("broken", "redirected to what is not a URL", 1),
        ("noai", "X-Robots-Tag: noai", 1),
        ("nonsense", "failed after 3 attempts", 3),
        ("hangup", "failed after 3 attempts", 3),
    ],
)
def test_bad(server, path, reason, attempts):
    server.seen.clear()
    began = time.monotonic()
    with pytest.raises(Rejected, match=reason):
        Fetcher(HASTY if path.startswith(("slow", "drip")) else QUICK).get(Remote(url(server, path)))
    assert server.seen[f"/{path}"] == attempts
    # far from the seconds that the server would take, whatever this machine is busy with
    assert time.monotonic() - began < 15


def test_redirects_share_the_time_of_one_attempt(server):
    with pytest.raises(Rejected, match="failed after 1 attempts"):
        Fetcher(replace(HASTY, retries=0, redirects=1000)).get(Remote(url(server, "slow_loop")))


def test_private_addresses(server, monkeypatch):
    closed = FetchOptions(**{**vars(QUICK), "private": False})
    for host in ("127.0.0.1", "localhost", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]"):
        with pytest.raises(Rejected, match="a private address"):
            Fetcher(closed).get(Remote(f"http://{host}:{server.server_port}/image"))
    monkeypatch.setattr(fetch, "_public", lambda address: address == "127.0.0.1")
    assert Fetcher(closed).get(Remote(url(server, "image"))) == IMAGE
    with pytest.raises(Rejected, match=r"127\.0\.0\.2, a private address"):
        Fetcher(closed).get(Remote(url(server, "private")))


@pytest.mark.parametrize(
    "address",
    [
        *("10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1"),
        *("fe80::1%eth0", "fc00::1", "::", "ff02::1", "::7f00:1", "::ffff:a00:1", "64:ff9b::a00:1", "2002:7f00:1::"),
        *("fec0::1", "64:ff9b:1::808:808", "::ffff:0:a00:1"),
    ],
)
def test_what_is_private(address):
    assert not fetch._public(address)


@pytest.mark.parametrize(
    "address",
    ["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "::ffff:808:808", "64:ff9b::808:808", "2002:808:808::"],
)
def test_what_is_public(address):
    assert fetch._public(address)


def test_the_next_address_is_tried(server, monkeypatch):
    """The first has no listener."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.3", 0))
        resolve = socket.getaddrinfo
        hosts = {"two.places": ("127.0.0.3", "127.0.0.1")}

        def resolved(host, port, *args, **kwargs):
            return [found for name in hosts.get(host, (host,)) for found in resolve(name, port, *args, **kwargs)]

        monkeypatch.setattr(fetch.socket, "getaddrinfo", resolved)
        assert Fetcher(QUICK).get(Remote(f"http://two.places:{server.server_port}/image")) == IMAGE


@pytest.mark.parametrize(("number", "reason"), [(socket.EAI_AGAIN, ""), (socket.EAI_NONAME, "unknown host")])
def test_names_are_asked_again_where_that_may_help(server, monkeypatch, number, reason):
    resolve, asked = socket.getaddrinfo, []

    def resolved(host, *args, **kwargs):
        asked.append(host)
        if len(asked) == 1:
            raise socket.gaierror(number, "no answer")
        return resolve("127.0.0.1", *args, **kwargs)

    monkeypatch.setattr(fetch.socket, "getaddrinfo", resolved)
    if reason:
        with pytest.raises(Rejected, match=reason):
            Fetcher(QUICK).get(Remote(f"http://some.where:{server.server_port}/image"))
    else:
        assert Fetcher(QUICK).get(Remote(f"http://some.where:{server.server_port}/image")) == IMAGE


@given(st.text(max_size=30) | st.text("[]:/@%#?\0\t.ax1-", max_size=20).map("http://".__add__))
def test_no_address_escapes(text):
    """Whatever a table holds is rejected with a reason; nothing else is raised."""
    with pytest.MonkeyPatch.context() as patch:
        resolve = socket.getaddrinfo  # without asking a server for names
        patch.setattr(
            fetch.socket, "getaddrinfo", lambda host, port, **kw: resolve(host, port, flags=socket.AI_NUMERICHOST, **kw)
        )
        with pytest.raises(Rejected):
            CAREFUL.get(Remote(text))


def test_a_name_that_changes_its_address_is_asked_once(server, monkeypatch):
    asked = []

    def rebinding(host, port, **kwargs):
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1" if len(asked) == 1 else "10.0.0.1", port))]

    monkeypatch.setattr(fetch.socket, "getaddrinfo", rebinding)
    monkeypatch.setattr(
        fetch.socket, "create_connection", lambda address, timeout: _connect(address, asked), raising=True
    )
    assert Fetcher(QUICK).get(Remote(f"http://two.faces:{server.server_port}/image")) == IMAGE
    assert asked == ["two.faces", ("127.0.0.1", server.server_port)]


def _connect(address, asked):
    asked.append(address)
    raw = socket.socket()
    raw.connect(address)
    return raw


def test_robots(server):
    check = Fetcher(QUICK)._check_robots
    for tag in ("noai", "max-snippet:5, NoIndex", "sluice-prep: noai", "*: noimageai", "none"):
        with pytest.raises(Rejected):
            check([tag])
    check(["otherbot: noai", "all", "unavailable_after: 25 Jun 2010"])
    open_minded = FetchOptions(**{**vars(QUICK), "robots": False})
    assert Fetcher(open_minded).get(Remote(url(server, "noai"))) == IMAGE


@pytest.mark.parametrize("kind", ["md5", "sha1", "sha256"])
def test_expected_hash(server, kind):
    right = hashlib.new(kind, IMAGE).hexdigest()
    assert Fetcher(QUICK).get(Remote(url(server, "image"), f" {right.upper()}\n")) == IMAGE
    with pytest.raises(Rejected, match=f"another {kind}"):
        Fetcher(QUICK).get(Remote(url(server, "image"), right[:-1] + ("0" if right[-1] != "0" else "1")))
    with pytest.raises(Rejected, match="neither"):
        Fetcher(QUICK).get(Remote(url(server, "image"), "abc"))


def test_requests_to_one_host_are_spaced():
    turns = []
    fetcher = Fetcher(FetchOptions(per_host=100.0))
    now = time.monotonic()
    for host in ["a"] * 5 + ["b"]:
        fetcher._wait_turn(host)
        turns.append(time.monotonic() - now)
    assert turns[4] >= 0.04


def test_waiting_for_a_turn_is_no_part_of_the_time_limit(server):
    """Twelve requests to one host take longer than one may take; all are answered at the first attempt."""
    options = FetchOptions(**{**vars(QUICK), "timeout": 1.0, "per_host": 8.0, "retries": 0, "concurrency": 12})
    record = Record("a", "a", Remote(url(server, "image")))
    done = list(fetch.fetched([(i, "train", record) for i in range(12)], options))
    assert all(task[2].image == Inline(IMAGE) for task in done)


def test_a_table_of_urls(server, tmp_path):
    paths = ["image?1", "html", "image?2", "truncated", "disguised_html", "image?3", "missing"]
    (tmp_path / "t.csv").write_text("url,text\n" + "".join(f"{url(server, p)},{i}\n" for i, p in enumerate(paths)))
    source = TableSource([tmp_path / "t.csv"], Columns("url", ("text",)))
    options = Options({}, fetch=QUICK)
    built = build(source, tmp_path / "out", options)
    assert (built.counts.samples, built.counts.rejects) == (3, 4)
    content = members(tmp_path / "out/train")
    assert [content[f"{i:09d}.txt"] for i in (0, 2, 5)] == [b"0", b"2", b"5"]
    rejects = {r["input"]: r["reason"] for r in lines(tmp_path / "out/rejects.jsonl")}
    assert "not an image" in rejects[4] and list(rejects) == [1, 3, 4, 6]


def test_order_is_kept_and_threads_are_bounded():
    running, most = [], []
    lock = threading.Lock()

    def get(remote):
        with lock:
            running.append(remote)
            most.append(len(running))
        time.sleep(0.002 * (int(remote.url) % 3))
        with lock:
            running.remove(remote)
        return remote.url.encode()

    tasks = [(i, "train", Record(str(i), str(i), Remote(str(i)))) for i in range(50)]
    out = list(fetch.fetched(tasks, FetchOptions(concurrency=4), get))
    assert [t[2].image.data for t in out] == [str(i).encode() for i in range(50)]
    assert 1 < max(most) <= 4
