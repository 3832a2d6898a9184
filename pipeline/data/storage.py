"""Where the bytes of shards come from: local files, URLs by ranges, or URLs through a cache of whole shards."""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from pipeline.config.schema import Cache
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.location import filesystem, is_url, reason
from pipeline.core.manifest import Manifest, Shard

_OPEN_FILES = 256
_ATTEMPTS = 3
_PAUSE = 1.0
"""Seconds before the second attempt at a server; twice as long before each next one."""
_WAIT = 0.05
"""Seconds between looks whether there is room in a cache."""
_CHUNK = 8 << 20
_IN_REACH = 1 << 20
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


def _wrong_size(where: str, found: int, shard: Shard) -> DataError:
    return DataError(
        f"shard {where} has {found} bytes, its manifest says {shard.bytes}: it was cut or changed; "
        "restore it, or renew the manifest with `sluice prep index`"
    )


def _missing(where: str, error: OSError) -> DataError:
    return DataError(
        f"cannot open shard {where} ({reason(error)}); put it back, or renew the manifest with `sluice prep index`"
    )


def check_shard(manifest: Manifest, shard: Shard) -> None:
    """Raise DataError when a shard is missing or its size is not the manifest's."""
    where = f"{manifest.root.rstrip('/')}/{shard.name}"
    try:
        if is_url(manifest.root):
            files, path = filesystem(manifest.root)
            found = patiently(where, lambda: files.size(f"{path.rstrip('/')}/{shard.name}"))
        else:
            found = os.stat(where).st_size
    except OSError as error:
        raise _missing(where, error) from error
    # A server need not say how long a file is.
    if found is not None and found != shard.bytes:
        raise _wrong_size(where, found, shard)


class Local:
    """Shards in a local folder. The least recently used files are closed."""

    copies = 1
    piece = _IN_REACH

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
                    raise _wrong_size(f"{self._root}/{shard.name}", os.fstat(descriptor).st_size, shard)
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
                raise _missing(where, error) from error
            found = os.fstat(descriptor).st_size
            if found != shard.bytes:
                os.close(descriptor)
                raise _wrong_size(where, found, shard)
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
        where, name = f"{self._root}/{shard.name}", f"{path.rstrip('/')}/{shard.name}"

        def fetch() -> list[bytes]:
            parts = files.cat_ranges([name] * len(starts), starts, stops, on_error="raise")
            for part, start, stop in zip(parts, starts, stops, strict=True):
                if len(part) != stop - start:
                    raise DataError(
                        f"asked for {stop - start} bytes at {start}, got {len(part)}: the file is cut, or the server "
                        "does not serve ranges and needs data.cache"
                    )
            return parts

        try:
            return patiently(where, fetch)
        except OSError as error:
            raise _missing(where, error) from error

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


class Cached:
    """Shards at a URL through a folder of whole ones, shared by all processes of a node.

    A shard is fetched by one process while the others wait, hashed on the way, and appears under its name when it is
    whole. The folder is kept below its limit by removing the shards that were not used for longest; whoever has one
    open keeps reading it.

    Args:
        root: URL.
        folder: local folder, used for this data set alone.
        limit: bytes.
    """

    copies = 1
    piece = _IN_REACH

    def __init__(self, root: str, folder: str, limit: int) -> None:
        self._root = root.rstrip("/")
        self._folder = Path(folder)
        self._limit = limit
        self._local = Local(folder)
        self._ahead: ThreadPoolExecutor | None = None
        self._asked: OrderedDict[str, None] = OrderedDict()

    def read(self, ranges: Ranges, into: memoryview) -> None:
        """See :class:`Storage`."""
        while True:
            self._ensure(ranges.shard)
            try:
                self._local.read(ranges, into)
                return
            except DataError:
                # Another process may have made room in between.
                if (self._folder / ranges.shard.name).exists():
                    raise

    def expect(self, wanted: Sequence[Ranges]) -> None:
        """See :class:`Storage`."""

    def prefetch(self, shards: Sequence[Shard]) -> None:
        """See :class:`Storage`: they are fetched in the background."""
        if self._ahead is None:
            self._ahead = ThreadPoolExecutor(2, "fetch")
        for shard in shards:
            if shard.name not in self._asked:
                self._asked[shard.name] = None
                self._ahead.submit(self._ensure, shard)
                if len(self._asked) > _OPEN_FILES:
                    self._asked.popitem(last=False)

    def close(self) -> None:
        """See :class:`Storage`."""
        if self._ahead is not None:
            self._ahead.shutdown(cancel_futures=True)
        self._local.close()

    def _ensure(self, shard: Shard) -> None:
        """Bring a shard into the folder, unless it is there."""
        path = self._folder / shard.name
        if not self._touch(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_name(f".{path.name}.lock")):
                if not self._touch(path):
                    self._fetch(shard, path)

    def _touch(self, path: Path) -> bool:
        """Note that a shard is in use. False: it is not there."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _fetch(self, shard: Shard, path: Path) -> None:
        files, root = filesystem(self._root)
        where, part = f"{self._root}/{shard.name}", path.with_name(f".{path.name}.part")

        def fetch() -> None:
            digest, size = hashlib.sha256(), 0
            self._reserve(part, shard.bytes)
            with (
                files.open(f"{root.rstrip('/')}/{shard.name}", "rb", block_size=_CHUNK) as source,
                open(part, "wb") as f,
            ):
                while chunk := source.read(_CHUNK):
                    f.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
            if size != shard.bytes or digest.hexdigest() != shard.sha256:
                raise (
                    _wrong_size(where, size, shard)
                    if size != shard.bytes
                    else DataError("its sha256 is not the manifest's")
                )
            os.replace(part, path)

        try:
            patiently(where, fetch)
        except OSError as error:
            raise _missing(where, error) from error
        finally:
            part.unlink(missing_ok=True)

    def _reserve(self, part: Path, size: int) -> None:
        """Make a file of ``size`` bytes for a shard to come, once the limit allows, removing shards for it."""
        while not self._fits(part, size):
            time.sleep(_WAIT)

    def _fits(self, part: Path, size: int) -> bool:
        """Whether the space could be had; if not, shards that are on their way take it and will be usable soon."""
        with _locked(self._folder / ".lock"):
            kept: list[tuple[float, int, Path]] = []
            coming = 0
            for path in self._folder.rglob("*"):
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                if path.name.endswith(".part") and path != part:
                    coming += status.st_size * self._is_coming(path)
                elif path.is_file() and not path.name.startswith("."):
                    kept.append((status.st_mtime, status.st_size, path))
            excess = coming + sum(s for _, s, _ in kept) + size - self._limit
            for _, freed, path in sorted(kept):
                if excess <= 0:
                    break
                path.unlink(missing_ok=True)
                excess -= freed
            if excess <= 0:
                with open(part, "wb") as f:
                    f.truncate(size)
            return excess <= 0

    @staticmethod
    def _is_coming(part: Path) -> bool:
        """Whether someone fetches this; what a killed process left is removed."""
        with open(part.with_suffix(".lock"), "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            part.unlink(missing_ok=True)
            return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock among the processes and threads of this node; a process that dies lets go of it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def open_storage(manifest: Manifest, cache: Cache | None = None) -> Storage:
    """What reads the shards of a data set.

    Args:
        manifest: the data set.
        cache: where whole shards of remote data sets are kept; None: they are read by ranges.

    Raises:
        ConfigError: the cache cannot hold the largest shard.
    """
    if not is_url(manifest.root):
        return Local(manifest.root)
    if cache is None:
        return Remote(manifest.root)
    largest, limit = max((s.bytes for s in manifest.shards), default=0), int(cache.limit_gb * 10**9)
    if largest > limit:
        raise ConfigError(f"data.cache.limit_gb = {cache.limit_gb:g} is less than a shard of {largest / 1e9:.3g} GB")
    # Of the shards that are alike in two data sets, each set keeps its own: only then is the name enough to know one.
    return Cached(manifest.root, str(Path(cache.folder) / manifest.fingerprint), limit)
