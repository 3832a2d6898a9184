"""``beats/00003``: what a rank is doing, in a file of its own that is overwritten in place at every step.

A rank that is killed leaves the last thing it said, so that the step at which an attempt died is known, and a rank
that hangs can be told from those that wait for it. Writing is one small pwrite into bytes that are there already: it
costs microseconds, and works on a full disk.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.record.process import boot, born

FOLDER = "beats"
WIDTH = 512
"""Bytes of a line, its end included: a host's name may have 255."""


@dataclass(frozen=True)
class Beat:
    """What a rank said last."""

    rank: int
    host: str
    pid: int
    attempt: int
    """How often the run was started before."""
    step: int
    """The update that is being made, or was made last when ``phase`` is something done between two."""
    phase: str
    """"start", "data" (waiting for a batch), "step", "end", "survey NAME", or the name of an action: "log" ..."""
    time: float
    """When the phase began; seconds since 1970, by the rank's clock."""
    step_seconds: float | None = None
    """From the start of the step before last to that of the last one; None before the second."""
    alive: float | None = None
    """When the rank's watchdog thread last ran, while the phase lasts long; None until then."""
    boot: str = ""
    """Of its machine; empty: of a program that did not say."""
    born: str = ""
    """When its process was started; see :mod:`pipeline.record.process`."""


class Pulse:
    """A rank's own beats.

    Args:
        folder: the run's.
        rank: of this process.
        attempt: how often the run was started before.
    """

    def __init__(self, folder: Path, rank: int, attempt: int) -> None:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        self._file = os.open(folder / FOLDER / f"{rank:05d}", os.O_RDWR | os.O_CREAT, 0o666)
        host, pid = socket.gethostname(), os.getpid()
        self.last = Beat(rank, host, pid, attempt, 0, "start", time.time(), boot=boot(), born=born(pid) or "")
        self.began = time.monotonic()
        """When the phase began, by a clock that is never set."""
        self.steps: deque[float] = deque(maxlen=100)
        """Seconds of the last steps, with what was done between them."""
        self.longest: dict[str, float] = {}
        """Seconds of the longest stay in each phase that is not a step."""
        self._step_began: float | None = None
        os.pwrite(self._file, _line({"alive": None}), WIDTH)
        self._write()

    def at(self, phase: str, step: int | None = None) -> None:
        """Say that ``phase`` begins; ``step`` as in :class:`Beat`, left out: as before."""
        now = time.monotonic()
        left = self.last.phase
        self.longest[left] = max(self.longest.get(left, 0.0), now - self.began)
        if phase == "step":
            if self._step_began is not None:
                self.steps.append(now - self._step_began)
            self._step_began = now
        self.began = now
        step = self.last.step if step is None else step
        seconds = self.steps[-1] if self.steps else None
        self.last = replace(self.last, phase=phase, step=step, time=time.time(), step_seconds=seconds)
        self._write()

    def live(self) -> None:
        """Say that the process runs, though the phase lasts. From another thread: it writes bytes of its own."""
        os.pwrite(self._file, _line({"alive": time.time()}), WIDTH)
        os.fsync(self._file)  # over NFS, other machines see it only then

    def _write(self) -> None:
        facts = {name: value for name, value in vars(self.last).items() if name != "alive"}
        os.pwrite(self._file, _line(facts), 0)

    def close(self) -> None:
        """Close the file; what was said last stays."""
        os.close(self._file)


def _line(facts: dict[str, object]) -> bytes:
    text = json.dumps(facts).encode().ljust(WIDTH - 1) + b"\n"
    assert len(text) == WIDTH, f"{len(text)} bytes do not fit into a beat"
    return text


def read_beats(folder: Path) -> list[Beat]:
    """The last beat of each rank of the newest attempt, by rank.

    A rank that has not said anything yet, or that was killed while it made its file, has none.
    """
    found = [beat for path in sorted((folder / FOLDER).glob("[0-9]*")) if (beat := _read(path)) is not None]
    newest = max((beat.attempt for beat in found), default=0)
    return [beat for beat in found if beat.attempt == newest]


def _read(path: Path) -> Beat | None:
    for _ in range(3):  # a line that is overwritten at this moment may be seen half and half
        try:
            facts, alive = path.read_bytes().splitlines()
            return Beat(**json.loads(facts), **json.loads(alive))
        except (OSError, ValueError, TypeError):  # a network's file system has more ways to fail than being empty
            continue
    return None
