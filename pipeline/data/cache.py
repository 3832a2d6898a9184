"""A folder of whole shards of a URL, shared by all processes of a node."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.errors import DataError
from pipeline.core.location import filesystem, join
from pipeline.core.manifest import Shard
from pipeline.data.storage import IN_REACH, Local, Ranges, missing, patiently, wrong_size

_REMEMBERED = 256
"""Shards that are not asked for a second time."""
_WAIT = 0.05
"""Seconds between looks whether there is room in a cache."""
_CHUNK = 8 << 20


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
    piece = IN_REACH

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
                if len(self._asked) > _REMEMBERED:
                    self._asked.popitem(last=False)

    def close(self) -> None:
        """See :class:`Storage`."""
        if self._ahead is not None:
            self._ahead.shutdown(cancel_futures=True)
        self._local.close()

    def _ensure(self, shard: Shard) -> None:
        """Bring a shard into the folder, unless it is there."""
        path = self._folder / shard.name
        if not self._touch(path, shard.bytes):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_name(f".{path.name}.lock")):
                if not self._touch(path, shard.bytes):
                    self._fetch(shard, path)

    def _touch(self, path: Path, size: int) -> bool:
        """Note that a shard is in use. False: it is not there, or not whole after a crash of the node."""
        try:
            os.utime(path)
            return path.stat().st_size == size
        except FileNotFoundError:
            return False

    def _fetch(self, shard: Shard, path: Path) -> None:
        files, root = filesystem(self._root)
        where, part = f"{self._root}/{shard.name}", path.with_name(f".{path.name}.part")

        def fetch() -> None:
            digest, size = hashlib.sha256(), 0
            self._reserve(part, shard.bytes)
            with (
                files.open(join(root, shard.name), "rb", block_size=_CHUNK) as source,
                # Not cut to nothing: others see by its size what is taken.
                open(part, "r+b") as f,
            ):
                while chunk := source.read(_CHUNK):
                    f.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
            if size != shard.bytes or digest.hexdigest() != shard.sha256:
                raise (
                    wrong_size(where, size, shard)
                    if size != shard.bytes
                    else DataError("its sha256 is not the manifest's")
                )
            os.replace(part, path)

        try:
            patiently(where, fetch)
        except OSError as error:
            raise missing(where, error) from error
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
