"""Stored numbers: ``vector``, [B,*size], from a .npy member: a teacher's outputs, embeddings, codes.

Several at once are ``[data.field.NAME]`` tables with ``name = "vector"``; NAME stands in the batch.
"""

from __future__ import annotations

import io
import math
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.lib import format as npy

from pipeline.config.schema import Positive, Strict
from pipeline.config.schema import Text as Word
from pipeline.data.field import Arrays, Column, Field, FieldSource, Sample, Unusable

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class Config(Strict):
    """Which numbers, and how many."""

    size: Positive | tuple[Positive, ...]
    """Shape of a sample's array, the same for all; one number for a vector."""
    member: Word = "npy"
    """An array as numpy.save writes it; "NAME:npy" is that of a sidecar."""
    dtype: Literal["float16", "float32", "int32", "int64"] = "float32"
    """In the batch. Stored numbers of other kinds are converted, where none of them is lost."""


class Vector(Field):
    """An array of fixed shape.

    Raises:
        ConfigError: the data set has no such member.
    """

    def __init__(self, config: Config, source: FieldSource) -> None:
        super().__init__()
        self._member = source.has(config.member, f"{source.where}.member")
        self._shape = (config.size,) if isinstance(config.size, int) else config.size
        self._name = source.name
        self.needs = (self._member,)
        self.columns = {source.name: Column(config.dtype, self._shape)}

    def decode(self, sample: Sample, drawn: Any, arrays: Arrays, row: int) -> None:
        """See :meth:`Field.decode`."""
        try:
            stored = read_npy(sample.members[self._member], self._shape)
            arrays[self._name][row] = converted(stored, arrays[self._name].dtype)
        except ValueError as error:
            raise Unusable(self._member, str(error)) from error


def read_npy(data: memoryview, shape: tuple[int, ...]) -> np.ndarray:
    """An array as numpy.save writes it, without a copy; nothing is unpickled.

    Raises:
        ValueError: no such file, an array of another shape, or of something else than numbers.
    """
    wide = 4 if data[6:7] == b"\x02" else 2  # bytes of the header's length, behind magic and version
    start = 8 + wide + int.from_bytes(data[8 : 8 + wide], "little")
    found, is_fortran, dtype = _header(bytes(data[:start]))
    if dtype.kind not in "fiu":
        raise ValueError(f"an array of {dtype}, not of numbers")
    if found != shape:
        raise ValueError(f"an array of {list(found)}, not of {list(shape)}")
    rest = data[start:]
    if len(rest) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(rest)} bytes of numbers, which is not what its header says")
    return np.frombuffer(rest, dtype).reshape(shape, order="F" if is_fortran else "C")


@lru_cache(maxsize=64)
def _header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and type. Numpy reads a header as a line of Python, and those of a data set are all alike."""
    file = io.BytesIO(data)
    try:
        return _HEADERS[npy.read_magic(file)](file)
    except Exception as error:  # in many ways
        raise ValueError(f"not a readable .npy ({error!r:.80})") from error


def converted(stored: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Numbers in another type.

    Raises:
        ValueError: one of them is not finite, or does not fit.
    """
    if stored.dtype.kind == "f" and not np.isfinite(stored).all():
        raise ValueError("a number in it is not finite")
    if dtype.kind == "i":
        if stored.dtype.kind == "f":
            raise ValueError(f"numbers of type {stored.dtype}, which are no whole ones")
        limits = np.iinfo(dtype)
        if stored.size and not (limits.min <= int(stored.min()) and int(stored.max()) <= limits.max):
            raise ValueError(f"a number in it is too large for {dtype}")
    with np.errstate(over="ignore"):
        numbers = stored.astype(dtype)
    if dtype.kind == "f" and not np.isfinite(numbers).all():
        raise ValueError(f"a number in it is too large for {dtype}")
    return numbers
