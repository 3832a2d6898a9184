"""Whether what stands before a member in a tar is its header: checksum and size, for many members at once."""

from __future__ import annotations

import numpy as np

from pipeline.data.order import Ints

BLOCK = 512
"""Bytes of a tar header, which lies right before its member's data."""
_SIZE, _CHECKSUM = slice(124, 136), slice(148, 156)
"""Where both stand in a header."""


def header_problems(buffer: np.ndarray, at: Ints, size: Ints) -> dict[int, str]:
    """Which samples have a member with a bad tar header, and what is wrong with it.

    Args:
        buffer: uint8, the bytes read.
        at: int64[R,F], where the members' data begin in it, each right after its header.
        size: int64[R,F], bytes of the data, as the index says; -1 where there is no member.
    """
    blocks = np.ndarray((len(buffer) - BLOCK + 1, BLOCK), np.uint8, buffer, strides=(1, 1))
    headers, sizes = blocks[at.ravel() - BLOCK], size.ravel()
    field, sized = headers[:, _CHECKSUM], headers[:, _SIZE]
    # The checksum counts itself as blanks.
    checksum = _sums(headers) - field.sum(1, dtype=np.int64) + ord(" ") * field.shape[1]
    problems: dict[int, str] = {}
    for member in _unlike(field, 6, checksum):
        written = _number(field[member])
        if sizes[member] >= 0 and written != checksum[member]:
            words = "it has no tar header before its data" if written is None else "a tar header has a wrong checksum"
            problems.setdefault(member // at.shape[1], words)
    for member in _unlike(sized, 11, sizes):
        # Sizes of 8 GiB and more are in binary, marked by the highest bit.
        if sizes[member] >= 0 and sized[member, 0] < 0x80 and _number(sized[member]) != sizes[member]:
            problems.setdefault(member // at.shape[1], "a tar header says another size than the index")
    return problems


def _unlike(text: np.ndarray, digits: int, value: Ints) -> list[int]:
    """Rows whose text is not the value written in octal in the form that nearly all writers use.

    Args:
        text: uint8[N,K] characters.
        digits: how many there are, from the first character on; another one after them would be another number.
        value: int64[N].
    """
    usual = (value[:, None] >> 3 * np.arange(digits - 1, -1, -1) & 7) + ord("0")
    return np.flatnonzero((text[:, :digits] != usual).any(1) | ((text[:, digits] >> 3) == ord("0") >> 3)).tolist()


def _number(text: np.ndarray) -> int | None:
    """A number written in octal, uint8[K] characters, padded with blanks or zero bytes in any way."""
    words = bytes(text).strip(b"\0 ")
    return int(words, 8) if words and set(words) <= set(b"01234567") else None


def _sums(rows: np.ndarray) -> Ints:
    """The sum of the bytes of each row, uint8[N,BLOCK] to int64[N]: four sums at a time in each 64-bit word."""
    words, mask = rows.view(np.uint64), np.uint64(0x00FF00FF00FF00FF)
    four = ((words & mask) + ((words >> np.uint64(8)) & mask)).sum(1)
    return four.view(np.uint16).reshape(-1, 4).sum(1, dtype=np.int64)
