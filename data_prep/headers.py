"""Many headers of a tar at once, with numpy: the plain ones, as tar programs write nearly all of theirs.

Reading headers one by one in Python takes longer than hashing the small files between them. Whatever is not plain
(long names, links, folders, damage) is left to the careful reader in ``walk.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data_prep.ustar import BLOCK, NAME_LENGTH

_MAGIC = int.from_bytes(b"usta", "little")
_OCTAL = 8 ** np.arange(10, -1, -1, dtype=np.int64)
_EVEN = np.uint64(0x00FF00FF00FF00FF)
_LANE = np.uint64(0xFFFF)
_MTIME = np.frombuffer(b" mtime=", np.uint8)
"""Python's tarfile puts an extended header with nothing but a time before each file whose time is no whole second."""


class Run(NamedTuple):
    """Plain regular files that follow each other."""

    names: np.ndarray
    """S100[N]"""
    offset: np.ndarray
    """int64[N], of the data in the archive."""
    size: np.ndarray
    """int64[N]"""
    until: int
    """Where the next header begins."""


def plain_run(window: np.ndarray, at: int, total: int) -> Run | None:
    """The plain files whose headers lie one after the other from the window's beginning on.

    Plain is: a name of at most 100 bytes in one field, a size below 8 GiB, a sound checksum, the data inside the
    archive, and at most a time in an extended header before it.

    Args:
        window: uint8[W], bytes of the archive; a header begins at the first.
        at: Place of the window in the archive.
        total: Bytes of the archive.

    Returns:
        None if the first header is not plain.
    """
    n = len(window) // BLOCK
    blocks = window[: n * BLOCK].reshape(n, BLOCK)
    magic = np.ndarray(n, "<u4", blocks.data, offset=257, strides=(BLOCK,)) if n else np.empty(0, "<u4")
    found = np.flatnonzero(magic == _MAGIC)
    if not len(found) or found[0] != 0:
        return None
    heads = blocks[found]
    size, plain = _octal(heads[:, 124:136])
    follows = found + 1 + (size + BLOCK - 1) // BLOCK
    regular = heads[:, 156] == ord("0")
    plain &= _plain_name(heads) & _sound(heads) & (regular | _only_time(blocks, found, heads, size))
    plain &= ~regular | (at + (found + 1) * BLOCK + size <= total)
    chain = _chain(found, follows)
    bad = np.flatnonzero(~plain[chain])
    chain = chain[: bad[0]] if len(bad) else chain
    files = chain[regular[chain]]
    if not len(files):
        return None
    names = np.ascontiguousarray(heads[files, :NAME_LENGTH]).view(f"S{NAME_LENGTH}")[:, 0]
    return Run(names, at + (found[files] + 1) * BLOCK, size[files], at + int(follows[files[-1]]) * BLOCK)


def _octal(field: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Value of ASCII octal digits with one blank or zero byte after them, and where it is well formed."""
    digits = field[:, :-1] - np.uint8(ord("0"))
    return digits.astype(np.int64) @ _OCTAL[-digits.shape[1] :], (digits < 8).all(1) & (field[:, -1] & 0xDF == 0)


def _plain_name(heads: np.ndarray) -> np.ndarray:
    """Not empty, nothing after its end, and no second part in the prefix field."""
    zero = heads[:, :NAME_LENGTH] == 0
    return ~zero[:, 0] & ~(zero[:, :-1] & ~zero[:, 1:]).any(1) & (heads[:, 345] == 0)


def _sound(heads: np.ndarray) -> np.ndarray:
    """Whether the checksums are right: the sum of all bytes, the checksum's own taken as blanks."""
    words = heads.view("<u8")
    odd = words >> np.uint64(8)
    odd &= _EVEN
    even = words & _EVEN
    even += odd
    lanes = even.sum(1)  # four sums of 128 bytes, 16 bits each
    added = sum(((lanes >> np.uint64(shift)) & _LANE).astype(np.int64) for shift in (0, 16, 32, 48))
    promised, well_formed = _octal(heads[:, 148:155])
    well_formed &= heads[:, 155] & 0xDF == 0
    return well_formed & (promised == added - heads[:, 148:156].sum(1, dtype=np.int64) + 8 * ord(" "))


def _only_time(blocks: np.ndarray, found: np.ndarray, heads: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Which are extended headers with one record, ``LENGTH mtime=...``, where LENGTH has two digits."""
    extended = (heads[:, 156] == ord("x")) & (found + 1 < len(blocks))
    body = blocks[np.where(extended, found + 1, 0), :9]
    length = (body[:, 0].astype(np.int64) - ord("0")) * 10 + body[:, 1] - ord("0")
    return extended & (body[:, 0] > ord("0")) & (length == size) & (body[:, 2:] == _MTIME).all(1)


def _chain(found: np.ndarray, follows: np.ndarray) -> np.ndarray:
    """Numbers of the headers that lead from the first one to each next; others are data that looks like a header."""
    if (follows[:-1] == found[1:]).all():
        return np.arange(len(found))
    places, wanted = np.searchsorted(found, follows).tolist(), follows.tolist()
    known = found.tolist()
    chain = [0]
    while (i := places[chain[-1]]) < len(known) and known[i] == wanted[chain[-1]]:
        chain.append(i)
    return np.asarray(chain)
