"""What is exactly at a limit is inside it."""

import http.client
import io

import pytest

from data_prep import fetch
from data_prep.build import build
from data_prep.fetch import Fetcher, Remote
from data_prep.options import FetchOptions, Filters, Options
from data_prep.prepare import Sample, prepare
from data_prep.record import Inline, Record, Rejected, split_of
from pipeline.core.errors import ConfigError
from tests.unit.data_prep.samples import ListSource, png

WIDE = Record("a", "a", Inline(png(1, (30, 20))), caption="\u00e4bcd")


@pytest.mark.parametrize(
    ("inside", "outside", "reason"),
    [
        ({"min_side": 20}, {"min_side": 21}, "side of 20"),
        ({"max_aspect": 1.5}, {"max_aspect": 1.49}, "aspect ratio 1.50"),
        ({"min_area": 600}, {"min_area": 601}, "area of 600"),
        ({"max_area": 600}, {"max_area": 599}, "area of 600"),
        ({"min_caption": 4}, {"min_caption": 5}, "caption of 4"),
        ({"max_caption": 4}, {"max_caption": 3}, "caption of 4"),
    ],
)
def test_filters(inside, outside, reason):
    assert isinstance(prepare(WIDE, Options(filters=Filters(**inside))), Sample)
    assert str(prepare(WIDE, Options(filters=Filters(**outside)))).startswith(reason)


@pytest.mark.parametrize(("extra", "expected"), [(0, [3, 3, 2]), (-1, [2, 2, 2, 2]), (511, [3, 3, 2])])
def test_bytes_of_a_shard(tmp_path, extra, expected):
    data = png(1)
    each = 512 + -(-len(data) // 512) * 512  # a header, and the data in whole blocks
    records = [Record(f"{i}", f"{i}", Inline(data)) for i in range(8)]
    manifest = build(ListSource(records), tmp_path, Options({}, shard_bytes=3 * each + extra)).manifests["train"]
    assert [shard.samples for shard in manifest.shards] == expected


class Canned:
    """A socket that has received all it ever will."""

    def __init__(self, data):
        self.data = data

    def makefile(self, mode):
        return io.BytesIO(self.data)


def answered(head, body=b"", **options):
    answer = http.client.HTTPResponse(Canned(b"HTTP/1.1 " + head + b"\r\n\r\n" + body))
    answer.begin()
    with answer:
        return Fetcher(FetchOptions(**options))._read(answer)


@pytest.mark.parametrize("head", [b"200 OK", b"200 OK\r\nContent-Length: 100"])
def test_bytes_of_a_download(head):
    assert answered(head, bytes(100), max_bytes=100) == bytes(100)
    with pytest.raises(Rejected, match="99"):
        answered(head, bytes(100), max_bytes=99)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_answers_that_are_worth_another_attempt(status):
    with pytest.raises(fetch._Again, match=str(status)):
        answered(b"%d No" % status)


def test_one_of_several_robots_headers_is_enough():
    tags = b"\r\nX-Robots-Tag: otherbot: none\r\nX-Robots-Tag: noai"
    with pytest.raises(Rejected, match="noai"):
        answered(b"200 OK" + tags, b"x")


def test_robots_words_for_this_agent_alone():
    tag = b"200 OK\r\nX-Robots-Tag: Painter: noindex"
    with pytest.raises(Rejected, match="noindex"):
        answered(tag, b"x", agent="painter")
    assert answered(tag, b"x", agent="other") == b"x"


def test_turns_of_a_host_are_dealt_out_beforehand(monkeypatch):
    """Those who ask at the same time get one each; another host has its own."""
    waits = []
    monkeypatch.setattr(fetch.time, "monotonic", lambda: 100.0)
    monkeypatch.setattr(fetch.time, "sleep", waits.append)
    fetcher = Fetcher(FetchOptions(per_host=4.0))
    for host in "aaabaa":
        fetcher._wait_turn(host)
    assert waits == [0, 0.25, 0.5, 0, 0.75, 1.0]


def test_one_private_address_among_others_is_enough(monkeypatch):
    def resolved(host, port, **options):
        return [(2, 1, 6, "", (address, port)) for address in ("8.8.8.8", "10.0.0.1")]

    monkeypatch.setattr(fetch.socket, "getaddrinfo", resolved)
    monkeypatch.setattr(fetch.socket, "create_connection", lambda *arguments, **options: pytest.fail("connected"))
    with pytest.raises(Rejected, match=r"10\.0\.0\.1, a private address"):
        Fetcher(FetchOptions(retries=0)).get(Remote("http://two.places/"))


def test_what_is_downloaded_ahead_is_bounded():
    pulled = []
    tasks = ((i, "train", Record(str(i), str(i), pulled.append(i) or Remote(str(i)))) for i in range(90))
    for used, _ in enumerate(fetch.fetched(tasks, FetchOptions(concurrency=3), lambda remote: b"")):
        assert len(pulled) <= used + 1 + 4 * 3
    assert len(pulled) == 90


def test_bad_limits():
    nan, inf = float("nan"), float("inf")
    positive = [{name: n} for name in ("concurrency", "timeout", "max_bytes", "per_host") for n in (0, -1, nan)]
    counts = [{name: n} for name in ("retries", "backoff", "redirects") for n in (-1, nan)]
    for wrong in (*positive, *counts, {"timeout": inf}, {"backoff": inf}):
        with pytest.raises(ConfigError):
            FetchOptions(**wrong)
    FetchOptions(retries=0, backoff=0, redirects=0, per_host=inf)


def test_waits_between_attempts_double(monkeypatch):
    waits = []
    monkeypatch.setattr(fetch.time, "sleep", waits.append)
    fetcher = Fetcher(FetchOptions(retries=3, backoff=0.25))

    def fail(url):
        raise fetch._Again("no")

    monkeypatch.setattr(fetcher, "_follow", fail)
    with pytest.raises(Rejected, match="after 4 attempts"):
        fetcher.get(Remote("http://x"))
    assert waits == [0.25, 0.5, 1.0]


@pytest.mark.parametrize(
    ("identity", "seed", "splits", "expected"),
    [
        ("a.jpg", 0, {"val": 0.3001}, "val"),
        ("a.jpg", 0, {"val": 0.3}, "train"),
        ("\u00e4", 7, {"val": 0.1021}, "val"),
        ("\u00e4", 7, {"val": 0.102}, "train"),
        ("a.jpg", 0, {"val": 0.1, "test": 0.578}, "test"),
        ("a.jpg", 0, {"val": 0.1, "test": 0.577}, "train"),
        ("a.jpg", 0, {"test": 0.6417, "val": 0.1}, "test"),
    ],
)
def test_splits_are_the_same_in_every_version(identity, seed, splits, expected):
    """What is added years later must fall as it did.

    sha256("0\\0val\\0a.jpg") begins like 0.30002, ("7\\0val\\0\u00e4") like 0.10202, ("0\\0test\\0a.jpg") like 0.64167.
    """
    assert split_of(identity, splits, seed) == expected
