"""Reading single samples out of tars by the offsets in their index, with checks on every read."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.core.errors import DataError
from pipeline.core.manifest import Manifest, Shard, load_index

_BLOCK = 512
_OPEN_SHARDS = 256


class SampleError(DataError):
    """One sample that cannot be used; its shard may be fine otherwise."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(f"{shard}, sample {key!r}: {reason}")
        self.shard, self.key, self.reason = shard, key, reason

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str, str]]:
        return SampleError, (self.shard, self.key, self.reason)


@dataclass(frozen=True)
class _Open:
    """An open shard. S samples, F fields."""

    descriptor: int
    offset: np.ndarray
    size: np.ndarray


def check_shard(manifest: Manifest, shard: Shard) -> None:
    """Raise DataError when a shard is missing or its size is not the manifest's."""
    path = Path(manifest.root) / shard.name
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"cannot open shard {path} ({error.strerror}); put it back, or renew the manifest with `sluice prep index`"
        ) from error
    if found != shard.bytes:
        raise DataError(
            f"shard {path} has {found} bytes, its manifest says {shard.bytes}: it was cut or changed; "
            "restore it, or renew the manifest with `sluice prep index`"
        )


class Reader:
    """Samples of a local data set by number.

    Args:
        manifest: the data set.
        fields: fields that are read.
    """

    def __init__(self, manifest: Manifest, fields: Sequence[str]) -> None:
        self._manifest = manifest
        names = list(manifest.fields)
        self._columns = {name: names.index(name) for name in fields}
        self._shards: OrderedDict[int, _Open] = OrderedDict()

    def read(self, sample: int) -> dict[str, memoryview]:
        """The members of one sample by field; the memory may be written to.

        Raises:
            SampleError: a member is missing or damaged.
            DataError: the shard is.
        """
        number = bisect_right(self._manifest.starts, sample) - 1
        row = sample - self._manifest.starts[number]
        shard = self._open(number)
        members = {}
        for name, column in self._columns.items():
            offset, size = int(shard.offset[row, column]), int(shard.size[row, column])
            if offset < 0:
                raise self.error(sample, self._absent(shard, row, name))
            block = bytearray(_BLOCK + size)
            if os.preadv(shard.descriptor, [block], offset - _BLOCK) != len(block):
                raise self.error(sample, f"field {name!r} ends early")
            problem = _header_problem(block[:_BLOCK], size)
            if problem:
                raise self.error(sample, f"field {name!r}: {problem}")
            members[name] = memoryview(block)[_BLOCK:]
        return members

    def error(self, sample: int, reason: str) -> SampleError:
        """An error that names shard and key of a sample."""
        number = bisect_right(self._manifest.starts, sample) - 1
        shard = self._manifest.shards[number]
        keys = load_index(self._manifest, shard).keys
        return SampleError(shard.name, keys[sample - self._manifest.starts[number]], reason)

    def close(self) -> None:
        """Close all shards."""
        while self._shards:
            os.close(self._shards.popitem()[1].descriptor)

    def _open(self, number: int) -> _Open:
        """The shard, opened and checked; the least recently used ones are closed."""
        if number in self._shards:
            self._shards.move_to_end(number)
            return self._shards[number]
        shard = self._manifest.shards[number]
        check_shard(self._manifest, shard)
        index = load_index(self._manifest, shard)
        descriptor = os.open(Path(self._manifest.root) / shard.name, os.O_RDONLY | os.O_CLOEXEC)
        self._shards[number] = _Open(descriptor, index.offset, index.size)
        if len(self._shards) > _OPEN_SHARDS:
            os.close(self._shards.popitem(last=False)[1].descriptor)
        return self._shards[number]

    def _absent(self, shard: _Open, row: int, name: str) -> str:
        found = [field for field, offset in zip(self._manifest.fields, shard.offset[row], strict=True) if offset >= 0]
        return f"it has no field {name!r}, only {', '.join(found) or 'nothing'}"


def _header_problem(header: bytearray, size: int) -> str | None:
    """What is wrong with the tar header before a member's data, given the size that the index says."""
    try:
        checksum = int(header[148:156].strip(b"\0 "), 8)
    except ValueError:
        return "no tar header before its data"
    if sum(header) - sum(header[148:156]) + 8 * 0x20 != checksum:
        return "its tar header has a wrong checksum"
    large = header[124] & 0x80
    if not large and int(header[124:136].strip(b"\0 ") or b"0", 8) != size:
        return "its tar header says another size than the index"
    return None
