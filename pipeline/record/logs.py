"""``RUN/logs/rank-00003.log``: all that a rank and its children print, and what the console shows of it.

Output is redirected at the file descriptors, so what C++ prints is in the file too, and stays there whatever kills the
rank. A thread reads the file back and passes on to the console: all of rank 0, of the other ranks warnings and errors,
each with its rank. (A pipe through `tee` instead would lose the last words of a rank that is killed together with it.)
"""

from __future__ import annotations

import ctypes
import io
import os
import platform
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from typing_extensions import Buffer, override

from pipeline.core.errors import LaunchError

FOLDER = "logs"
HEADER = "=== "
"""Begins the line that each attempt writes first."""
ECHO_SECONDS = 0.2
TAIL_BYTES = 1 << 16
"""How far back the last error is looked for."""

_ERROR = re.compile(
    rb"\b\w*(Error|Exception)\b|\b(ERROR|FATAL|CRITICAL)\b|\b(error|fatal):"
    rb"|terminate called|Segmentation fault|^sluice: "
)
_ERROR_WORDS = (
    *(b"Error", b"Exception", b"ERROR", b"FATAL", b"CRITICAL", b"error:", b"fatal:"),
    *(b"terminate called", b"Segmentation fault", b"sluice: "),
)
"""One of them is in every line that :data:`_ERROR` finds; looking for them is a hundred times faster."""
_WARNING = re.compile(rb"\b\w*Warning\b|\bWARN(ING)?\b|\bwarning:")
_FRAME = re.compile(rb"\s*frame #\d+: |Exception raised from ")
"""Of the stacks that C++ adds to its messages: they name errors, and tell nobody anything."""
_TRACEBACK = b"Traceback (most recent call last)"

_terminal: list[TextIO] = []


def log_path(folder: Path, rank: int) -> Path:
    """Where a rank's output is kept."""
    return folder / FOLDER / f"rank-{rank:05d}.log"


def log_ranks(folder: Path) -> list[int]:
    """The ranks that have a log."""
    return sorted(int(p.stem[5:]) for p in (folder / FOLDER).glob("rank-*.log") if p.stem[5:].isdigit())


def console() -> TextIO:
    """Where a person may be waiting: the console while this rank's output is redirected, stderr otherwise."""
    return _terminal[-1] if _terminal else sys.stderr


@contextmanager
def rank_log(folder: Path, rank: int) -> Iterator[None]:
    """Inside, this process's output goes to the rank's log, and what matters of it to the console.

    Args:
        folder: the run's; its logs' folder is made if it is not there.
        rank: of this process.

    Raises:
        LaunchError: the log cannot be written.
    """
    path = log_path(folder, rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        os.write(log, f"{HEADER}rank {rank}, {now}, {platform.node()}, process {os.getpid()}\n".encode())
        start = os.fstat(log).st_size
    except OSError as error:
        raise LaunchError(f"cannot write {path}: {error.strerror}; make room, or set run.folder") from error
    _flush()
    before = sys.stdout, sys.stderr
    kept = [os.dup(1), os.dup(2)]
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.stdout, sys.stderr = (_text(_Or(number, kept[1])) for number in (1, 2))
    echo = _Echo(path, start, kept[1], _everything if rank == 0 else _Alarms(rank))
    echo.start()
    with open(os.dup(kept[1]), "w", encoding="utf-8", errors="replace") as terminal:
        _terminal.append(terminal)
        try:
            yield
        finally:
            _terminal.pop()
            _flush()
            echo.close()
            sys.stdout, sys.stderr = before
            for number, descriptor in enumerate(kept, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)


def outlive_readers() -> None:
    """From now on, work does not end because nobody reads its output any more, as after ``| head -1``."""
    if sys.stdout is sys.__stdout__:  # not what a test has put there
        _flush()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        sys.stdout, sys.stderr = (_text(_Or(number, nowhere, BrokenPipeError)) for number in (1, 2))


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)  # what C and C++ still hold


class _Or(io.RawIOBase):
    """Writes to one descriptor, or to another where the first one's disk is full: a message must not be lost of it."""

    def __init__(self, number: int, instead: int, errors: type[OSError] = OSError) -> None:
        self._number, self._instead, self._errors = number, instead, errors

    @override
    def isatty(self) -> bool:
        return os.isatty(self._number)

    @override
    def writable(self) -> bool:
        return True

    @override
    def fileno(self) -> int:
        return self._number

    @override
    def write(self, data: Buffer) -> int:
        try:
            return os.write(self._number, data)
        except self._errors:
            return os.write(self._instead, data)


def _text(raw: io.RawIOBase) -> TextIO:
    """A text stream whose lines are written at once, so that both streams keep their order."""
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", errors="replace", line_buffering=True)


class _Echo(threading.Thread):
    """Reads a growing file and passes on what ``choose`` makes of each new part.

    Args:
        path: the file.
        start: bytes that were there before.
        sink: descriptor of the console.
        choose: from new bytes to what the console shows.
    """

    def __init__(self, path: Path, start: int, sink: int, choose: Callable[[bytes], bytes]) -> None:
        super().__init__(name="rank-log", daemon=True)
        self._file = os.open(path, os.O_RDONLY)
        self._at, self._sink, self._choose = start, sink, choose
        self._over = threading.Event()

    def run(self) -> None:
        """Until :meth:`close`."""
        while not self._over.wait(ECHO_SECONDS) and self._pass_on():
            pass

    def _pass_on(self) -> bool:
        """Show what is new; False when nobody listens any more (the file has it all)."""
        while new := os.pread(self._file, 1 << 16, self._at):
            self._at += len(new)
            shown = self._choose(new)
            try:
                while shown:
                    shown = shown[os.write(self._sink, shown) :]
            except OSError:
                return False
        return True

    def close(self) -> None:
        """Show the rest, and end."""
        self._over.set()
        self.join()
        self._pass_on()
        os.close(self._file)


def _everything(new: bytes) -> bytes:
    return new


class _Alarms:
    """Chooses warnings, errors and tracebacks, line by line, each with its rank; what is repeated is shown once."""

    def __init__(self, rank: int) -> None:
        self._prefix = f"rank {rank} | ".encode()
        self._rest = b""
        self._in_traceback = False
        self._seen: set[bytes] = set()

    def __call__(self, new: bytes) -> bytes:
        *lines, self._rest = (self._rest + new).split(b"\n")
        return b"".join(self._prefix + line + b"\n" for line in lines if self._wanted(line))

    def _wanted(self, line: bytes) -> bool:
        if line.startswith(_TRACEBACK):
            self._in_traceback = True
            return True
        if self._in_traceback:
            self._in_traceback = line.startswith(b" ")
            return True
        if line in self._seen or _FRAME.match(line) or not (_ERROR.search(line) or _WARNING.search(line)):
            return False
        self._seen.add(line)
        return True


def last_error(folder: Path, rank: int) -> str | None:
    """The last line with an error in a rank's log, in its last attempt; None when there is none, or no log."""
    try:
        with open(log_path(folder, rank), "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            tail = file.read()
    except FileNotFoundError:
        return None
    if not any(word in tail for word in _ERROR_WORDS):
        return None
    for line in reversed(tail.split(b"\n")):
        if line.startswith(HEADER.encode()):
            return None
        if _ERROR.search(line) and not line.startswith(b" ") and not _FRAME.match(line):
            return line.decode(errors="replace").strip()
    return None
