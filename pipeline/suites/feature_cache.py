"""Columns of features on disk, each a safetensors file named by all that decides it.

A file appears under its name when it is whole, and is never changed after that. Its header says what it is of and the
sha256 of its rows; one that says otherwise, or whose rows are others, is not used, and is replaced when the column has
been made anew. Locks are the system's (flock), so that whoever dies holds none:

- ``.MARK.lock`` while a column is made: others wait for it, and after ``PATIENCE`` make it themselves.
- on the file itself, shared, as long as a process reads it; on ``.MARK.*.part`` while it is written. What is locked
  is not removed to make room; parts that are not locked were left by the dead.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.core.errors import DataError
from pipeline.core.files import sync_folder
from pipeline.core.location import reason
from pipeline.suites.features import Form

PATIENCE = 1200.0
"""Seconds to wait for another process; less than other ranks wait for this one."""
_LOOK = 0.1
_NAME = "rows"
_SUFFIX = ".safetensors"
_ALIGN = 64
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class Entry(NamedTuple):
    """What a column is known by."""

    about: str
    """All that decides it, as JSON."""

    @property
    def mark(self) -> str:
        """Its hash."""
        return hashlib.sha256(self.about.encode()).hexdigest()[:32]


class Kept(NamedTuple):
    """A column in a file that was looked through."""

    path: Path
    start: int
    """Bytes before the first row."""
    samples: int
    form: Form


class Part(NamedTuple):
    """A file that is being written."""

    kept: Kept
    entry: Entry
    token: bytes
    """Its first bytes until it is whole, by which other ranks know that they see the same file."""
    file: int
    """Descriptor, with the lock."""


def _header(entry: Entry, form: Form, samples: int, sha256: str) -> bytes:
    metadata = {"about": entry.about, "sha256": sha256}
    body = {"dtype": _CODES[form.dtype], "shape": [samples, *form.shape], "data_offsets": [0, samples * form.bytes]}
    text = json.dumps({"__metadata__": metadata, _NAME: body}).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    return len(text).to_bytes(8, "little") + text


class FeatureCache:
    """Files in one folder, together below a limit.

    Args:
        folder: exists.
        limit: bytes.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._said = False

    def find(self, entry: Entry, samples: int) -> tuple[Kept, Tensor] | None:
        """The file of an entry and its rows, all of it checked; None: there is none that can be used.

        Args:
            entry: what it must be of.
            samples: rows that it must have.
        """
        path = self._path(entry)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            return _warn(f"the kept features {path} cannot be read ({reason(error)}); they are made anew")
        try:
            kept, sha256 = _read_header(path, file, entry, samples)
            rows = _mapped(file, kept)
        except (OSError, ValueError, KeyError, TypeError) as error:
            os.close(file)
            return _warn(f"the kept features {path} are not used, but made anew: {error}")
        if sha256 != hashlib.sha256(rows.numpy().data).hexdigest():
            return _warn(f"the kept features {path} are not used, but made anew: their rows are damaged")
        with suppress(OSError):  # another user's may be read, and not touched
            os.utime(path)
        return kept, rows

    @contextmanager
    def claimed(self, entries: Sequence[Entry]) -> Iterator[None]:
        """While others wait, entries are made; returns at once, or when others are done with them, or have died."""
        files = []
        try:
            until = time.monotonic() + PATIENCE
            for mark in sorted({entry.mark for entry in entries}):  # in one order, so that no two wait for each other
                if (file := _alone(self._folder / f".{mark}.lock", until)) is not None:
                    files.append((file, self._folder / f".{mark}.lock"))
            yield
        finally:
            for file, path in files:
                path.unlink(missing_ok=True)
                os.close(file)

    def begin(self, entry: Entry, form: Form, samples: int) -> Part | None:
        """A file for an entry, of its full size; None, said why: there is no room for it, so it is not kept."""
        start = len(_header(entry, form, samples, "0" * 64))
        size, token = start + samples * form.bytes, secrets.token_bytes(16)
        path = self._folder / f".{entry.mark}.{token.hex()}.part"
        file = None
        try:
            with _locked(self._folder / ".lock"):
                if not self._made_room(size):
                    raise OSError(f"{size / 1e9:.3f} GB more would not fit below cache_gb")
                file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                _lock(file, fcntl.LOCK_EX)
                os.truncate(file, size)
            os.posix_fallocate(file, 0, size)
            os.pwrite(file, token, 0)
        except OSError as error:
            if file is not None:
                os.close(file)
                path.unlink(missing_ok=True)
            if not self._said:
                _warn(f"features are not kept in {self._folder}: {reason(error)}")
            self._said = True
            return None
        return Part(Kept(path, start, samples, form), entry, token, file)

    def seal(self, part: Part) -> tuple[Kept, Tensor]:
        """Give a file whose rows are all written, and synced, its header and its name; returns it as :meth:`find` does.

        Raises:
            DataError: it cannot be written.
        """
        kept = part.kept._replace(path=self._path(part.entry))
        try:
            rows = _mapped(part.file, kept)
        except (OSError, ValueError) as error:
            self.give_up(part)
            raise DataError(f"{part.kept.path} was changed by others while it was written; run it again") from error
        try:
            header = _header(part.entry, kept.form, kept.samples, hashlib.sha256(rows.numpy().data).hexdigest())
            os.pwrite(part.file, header, 0)
            os.fsync(part.file)
            os.replace(part.kept.path, kept.path)
            sync_folder(self._folder)
        except OSError as error:  # the file is closed with its map
            part.kept.path.unlink(missing_ok=True)
            raise unwritable(kept.path, error) from error
        return kept, rows

    def give_up(self, part: Part) -> None:
        """Leave nothing of a file that cannot be written."""
        part.kept.path.unlink(missing_ok=True)
        os.close(part.file)

    def _path(self, entry: Entry) -> Path:
        return self._folder / f"{entry.mark}{_SUFFIX}"

    def _made_room(self, size: int) -> bool:
        """Remove what was not used for longest and is not in use, until ``size`` bytes more are below the limit."""
        files: list[tuple[float, int, Path]] = []
        for path in self._folder.iterdir():
            if path.suffix in (_SUFFIX, ".part"):
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                is_part = path.suffix == ".part"
                files.append((-1.0 if is_part else status.st_mtime, status.st_size, path))
        excess = sum(bytes_ for _, bytes_, _ in files) + size - self._limit
        if size > self._limit:
            return False
        for used, bytes_, path in sorted(files):
            if (excess > 0 or used < 0) and _removed(path):
                excess -= bytes_
        return excess <= 0


def opened(kept: Kept) -> Tensor | None:
    """The rows of a file that rank 0 has found; None: this rank does not see it."""
    try:
        file = os.open(kept.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _mapped(file, kept)
    except (OSError, ValueError):
        os.close(file)
        return None


def _mapped(file: int, kept: Kept) -> Tensor:
    """Rows of a file, uint8[N,bytes], mapped into memory, private to this process and locked as long as they are used.

    Raises:
        ValueError: it has another size.
    """
    _lock(file, fcntl.LOCK_SH)
    if os.fstat(file).st_size != kept.start + kept.samples * kept.form.bytes:
        raise ValueError("it is cut")
    with os.fdopen(os.dup(file), "rb") as source:
        rows = np.memmap(source, np.uint8, "c", kept.start, (kept.samples, kept.form.bytes))
    weakref.finalize(rows, os.close, file)
    return torch.from_numpy(rows)


def unwritable(path: Path, error: OSError) -> DataError:
    """For what could be begun and not be ended."""
    return DataError(
        f"cannot write features into {path.parent} ({reason(error)}); make room there, set SLUICE_CACHE to another "
        "folder, or cache_gb = 0"
    )


def write_rows(kept: Kept, ids: Tensor, raw: Tensor) -> None:
    """Write rows into their places, those of numbers that follow each other at once."""
    cuts = (ids.diff() != 1).nonzero().flatten().add(1).tolist()
    file = os.open(kept.path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for begin, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
            content = raw[begin:end].numpy().data.cast("B")
            at = kept.start + int(ids[begin]) * kept.form.bytes
            while len(content):
                written = os.pwrite(file, content, at)
                content, at = content[written:], at + written
    finally:
        os.close(file)


def _read_header(path: Path, file: int, entry: Entry, samples: int) -> tuple[Kept, str]:
    """What a file says of itself, and the sha256 of its rows.

    Raises:
        ValueError, KeyError, TypeError: it is not what ``entry`` asks for.
    """
    size, whole = int.from_bytes(os.pread(file, 8, 0), "little"), os.fstat(file).st_size
    if not 0 < size <= whole - 8:
        raise ValueError("it is cut, or no safetensors file")
    header = json.loads(os.pread(file, size, 8))
    rows, metadata = header[_NAME], header["__metadata__"]
    if metadata["about"] != entry.about:
        raise ValueError("it is of something else")
    if rows["shape"][0] != samples:
        raise ValueError("it has another number of rows")
    form = Form(_DTYPES[rows["dtype"]], tuple(rows["shape"][1:]))
    return Kept(path, 8 + size, samples, form), metadata["sha256"]


def _warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _lock(file: int, how: int) -> None:
    """Lock a file, where the file system can.

    Raises:
        BlockingIOError: another process has it, and ``how`` says not to wait.
    """
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL):
            raise


def _alone(path: Path, until: float) -> int | None:
    """A descriptor that holds a lock; None: the folder takes no lock, or the other one takes too long."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        return None
    said = False
    while True:
        try:
            _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > until:
                os.close(file)
                return None
            if not said:
                _warn("another process extracts the same features; waiting for them")
            said = True
            time.sleep(_LOOK)


def _removed(path: Path) -> bool:
    """Remove a file that nobody uses. Without locks nobody knows, and all stay."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    except OSError:
        return False
    finally:
        os.close(file)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock for a moment."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _lock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
