"""Giving the labels in a shard other numbers, in place: the tar's layout and all other bytes stay as they are.

A label is a few digits in a block of 512 bytes that it has for itself, so the new digits fit where the old ones were;
only the member's size and checksum in its header change with them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from zlib_ng.zlib_ng import crc32

from data_prep.labels import label_number
from data_prep.ustar import BLOCK
from pipeline.core.errors import DataError
from pipeline.core.manifest import ShardIndex

_SIZE, _SUM = slice(124, 136), slice(148, 156)


def renumber(path: Path, index: ShardIndex, column: int, numbers: Sequence[int]) -> ShardIndex:
    """Change the labels in a tar; the index with their new sizes and checksums is returned.

    Args:
        path: A tar that is nobody else's: it is written to.
        index: Of the tar, its columns in any order.
        column: Of the labels.
        numbers: The new number of each class.

    Raises:
        DataError: a label is no number of a class, or its header is not what the index says.
    """
    size, check = index.size.copy(), None if index.crc32 is None else index.crc32.copy()
    with open(path, "r+b") as f:
        for row in np.flatnonzero(index.offset[:, column] >= 0).tolist():
            at, length = int(index.offset[row, column]), int(size[row, column])
            head, old = os.pread(f.fileno(), BLOCK, at - BLOCK), os.pread(f.fileno(), length, at)
            number = label_number(old)
            if number is None or number >= len(numbers):
                raise DataError(
                    f"{path.name}: label {old[:40]!r} of {index.keys[row]} is not one of {len(numbers)} classes"
                )
            new = str(numbers[number]).encode()
            os.pwrite(f.fileno(), _header(head, length, len(new), f"{path.name}: {index.keys[row]}"), at - BLOCK)
            os.pwrite(f.fileno(), new.ljust(-(-length // BLOCK) * BLOCK, b"\0"), at)
            size[row, column] = len(new)
            if check is not None:
                check[row, column] = crc32(new)
        os.fsync(f.fileno())
    return replace(index, size=size, crc32=check)


def _header(head: bytes, old: int, new: int, where: str) -> bytes:
    """A member's header with another size."""
    field = head[_SIZE].strip(b"\0 ")
    if len(head) < BLOCK or field.strip(b"01234567") or int(field or b"0", 8) != old:
        raise DataError(f"{where}: its label's header is not a plain one; repack with `sluice prep build tars`")
    changed = bytearray(head)
    changed[_SIZE] = b"%011o\0" % new
    changed[_SUM] = b" " * 8
    changed[_SUM] = b"%06o\0 " % sum(changed)
    return bytes(changed)
