"""Where the bytes of shards come from: local files, or URLs by ranges.

``cache.py`` keeps whole shards of URLs; ``access.py`` chooses among the three.
"""

from __future__ import annotations

import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeVar

from pipeline.core.errors import DataError
from pipeline.core.location import filesystem, join, reason
from pipeline.core.manifest import Shard

_OPEN_FILES = 256
_ATTEMPTS = 3
_PAUSE = 1.0
"""Seconds before the second attempt at a server; twice as long before each next one."""
IN_REACH = 1 << 20
"""Bytes that stay in a processor's own cache until they are checked."""
_CONNECTIONS = 8
"""Shards that are read at the same time; in each, all ranges at once."""

T = TypeVar("T")


class Ranges(NamedTuple):
    """Parts of a shard, in bytes."""

    shard: Shard
    starts: list[int]
    stops: list[int]
    """Each one after the last byte."""

    @property
    def bytes(self) -> int:
        """How many they are together."""
        return sum(self.stops) - sum(self.starts)


class Storage(Protocol):
    """Reads parts of shards."""

    copies: int
    """How many times the bytes of a read may be in memory, those that are expected included."""
    piece: int
    """About the number of bytes that are best read at a time."""

    def read(self, ranges: Ranges, into: memoryview) -> None:
        """Write the bytes of some ranges into memory, one after the other.

        Raises:
            DataError: the shard is missing, not of the manifest's size, or cannot be read.
        """
        ...

    def expect(self, wanted: Sequence[Ranges]) -> None:
        """After what is read now, these will be read."""
        ...

    def prefetch(self, shards: Sequence[Shard]) -> None:
        """These shards will be read soon."""
        ...

    def close(self) -> None:
        """Release files."""
        ...


def wrong_size(where: str, found: int, shard: Shard) -> DataError:
    """A shard that is shorter or longer than promised."""
    return DataError(
        f"shard {where} has {found} bytes, its manifest says {shard.bytes}: it was cut or changed; "
        "restore it, or renew the manifest with `sluice prep index`"
    )


def missing(where: str, error: OSError) -> DataError:
    """A shard that cannot be opened."""
    return DataError(
        f"cannot open shard {where} ({reason(error)}); put it back, or renew the manifest with `sluice prep index`"
    )


class Local:
    """Shards in a local folder. The least recently used files are closed."""

    copies = 1
    piece = IN_REACH

    def __init__(self, root: str) -> None:
        self._root = root.rstrip("/")
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, ranges: Ranges, into: memoryview) -> None:
        """See :class:`Storage`."""
        shard, starts, stops = ranges
        descriptor = self._descriptor(shard)
        at = 0
        for start, stop in zip(starts, stops, strict=True):
            while start < stop:
                count = os.preadv(descriptor, [into[at : at + stop - start]], start)
                if not count:
                    raise wrong_size(f"{self._root}/{shard.name}", os.fstat(descriptor).st_size, shard)
                start, at = start + count, at + count

    def expect(self, wanted: Sequence[Ranges]) -> None:
        """See :class:`Storage`: the system reads them from the disk meanwhile."""
        for shard, starts, stops in wanted:
            descriptor = self._descriptor(shard)
            for start, stop in zip(starts, stops, strict=True):
                os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)

    def prefetch(self, shards: Sequence[Shard]) -> None:
        """See :class:`Storage`."""

    def close(self) -> None:
        """See :class:`Storage`."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, shard: Shard) -> int:
        if shard.name not in self._open:
            where = f"{self._root}/{shard.name}"
            try:
                descriptor = os.open(where, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise missing(where, error) from error
            found = os.fstat(descriptor).st_size
            if found != shard.bytes:
                os.close(descriptor)
                raise wrong_size(where, found, shard)
            self._open[shard.name] = descriptor
            if len(self._open) > _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(shard.name)
        return self._open[shard.name]


def patiently(where: str, action: Callable[[], T]) -> T:
    """Do what a server may fail to do, a few times.

    Raises:
        FileNotFoundError: there is nothing at that place.
        DataError: the last failure.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return action()
        except Exception as error:  # each kind of server has exceptions of its own
            cause = error
            if isinstance(error, FileNotFoundError):
                # fsspec says so of silent HTTP servers too, and keeps what really happened as the cause.
                if error.__cause__ is None or getattr(error.__cause__, "status", None) == 404:
                    raise
                cause = error.__cause__
            if attempt == _ATTEMPTS - 1:
                words = f"{type(cause).__name__}: {cause}".rstrip(": ")
                raise DataError(f"cannot read {where} ({words}), tried {_ATTEMPTS} times") from error
            time.sleep(_PAUSE * 2**attempt)
    raise AssertionError("unreachable")


class Remote:
    """Shards at a URL, read by ranges: all ranges of a call at the same time where the server's package can."""

    copies = 3
    piece = sys.maxsize

    def __init__(self, root: str) -> None:
        self._root = root.rstrip("/")
        self._pool: ThreadPoolExecutor | None = None
        self._now: dict[tuple[str, ...], Future[list[bytes]]] = {}
        self._next: dict[tuple[str, ...], Future[list[bytes]]] = {}

    def read(self, ranges: Ranges, into: memoryview) -> None:
        """See :class:`Storage`."""
        key = _key(ranges)
        coming = self._now.pop(key, None) or self._next.pop(key, None)
        at = 0
        for part in coming.result() if coming else self._fetch(ranges):
            into[at : at + len(part)] = part
            at += len(part)

    def expect(self, wanted: Sequence[Ranges]) -> None:
        """See :class:`Storage`: they are fetched in the background. What was expected in vain is forgotten."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_CONNECTIONS, "ahead")
        self._now, self._next = self._next, {_key(r): self._pool.submit(self._fetch, r) for r in wanted}

    def _fetch(self, ranges: Ranges) -> list[bytes]:
        """The bytes of each range."""
        shard, starts, stops = ranges
        files, path = filesystem(self._root)
        where, name = f"{self._root}/{shard.name}", join(path, shard.name)

        def fetch() -> list[bytes]:
            # What failed comes back among the parts: asynchronous file systems raise nothing before fsspec 2026.6.
            parts = files.cat_ranges([name] * len(starts), starts, stops, on_error="return")
            for part, start, stop in zip(parts, starts, stops, strict=True):
                if isinstance(part, BaseException):
                    raise part
                if len(part) != stop - start:
                    raise DataError(
                        f"asked for {stop - start} bytes at {start}, got {len(part)}: the file is cut, or the server "
                        "does not serve ranges and needs data.cache"
                    )
            return parts

        try:
            return patiently(where, fetch)
        except OSError as error:
            raise missing(where, error) from error

    def prefetch(self, shards: Sequence[Shard]) -> None:
        """See :class:`Storage`."""

    def close(self) -> None:
        """See :class:`Storage`."""
        self._now, self._next = {}, {}
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def _key(ranges: Ranges) -> tuple[str, ...]:
    return (ranges.shard.name, str(ranges.starts), str(ranges.stops))
