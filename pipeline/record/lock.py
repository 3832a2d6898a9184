"""``lock``: one job at a time writes a run folder.

Where the file system has locks, the operating system answers, and knows at once that the holder is dead. Where it has
none, or only between processes of one machine (Lustre without ``flock``, some FUSE), the holder shows that it lives by
writing into the file every few seconds: who finds the lock held from another machine watches it for a while, and takes
it over only if nothing moves. Clocks of two machines are never compared. The file holds its own inode, by which a copy
of a run folder is known for one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.core.errors import LaunchError
from pipeline.record.process import boot, born

FILE = "lock"
WIDTH = 512
RENEWED = 5.0
"""Seconds between two signs of life of the holder."""
STALE = 4 * RENEWED
"""A lock of another machine that has not moved for so long is of a job that is dead."""
LOOK = 1.0
"""How long somebody who holds the lock and does not say who may do so."""
ORPHANED = 20.0
"""How long the loaders of a rank of this machine that was killed may take to let go of it."""
LEFT_BEHIND = 300.0
"""How long processes of the same SLURM job, on nodes that the scheduler gave up, may take to die."""
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class RunLock:
    """The right to write a run folder, held by rank 0 of a job until it releases it or dies."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._file: int | None = None
        self._me: dict[str, Any] = {
            "host": socket.gethostname(),
            "boot": boot(),
            "pid": os.getpid(),
            "born": born(os.getpid()),
            "job": os.environ.get("SLURM_JOB_ID"),
            "token": secrets.token_hex(8),
        }

    def take(self) -> None:
        """Take the lock. A holder of the same SLURM job is what a requeue has left behind, and is waited for.

        Raises:
            LaunchError: another job, which is alive, has it.
        """
        began = time.monotonic()
        while True:
            try:
                return self._take()
            except LaunchError:
                if time.monotonic() > began + self._patience(read_lock(self.path)):
                    raise
                time.sleep(RENEWED / 20)

    def _patience(self, holder: dict[str, Any] | None) -> float:
        """Seconds to wait for who has the lock: he may be dead, and his children or other nodes not know it yet."""
        if holder is None:
            return LOOK
        if holder["job"] is not None and holder["job"] == self._me["job"]:
            return LEFT_BEHIND
        return ORPHANED if holder["boot"] == boot() and born(holder["pid"]) != holder["born"] else 0.0

    def _take(self) -> None:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._file = file
            locks = self._system_lock(file)
            before = None if copied(self.path) else read_lock(self.path)
            elsewhere = before is not None and before["boot"] != self._me["boot"]
            if before is not None and (elsewhere or not locks):
                self._refuse_if_alive(before, elsewhere)
            self._write()
            if elsewhere or not locks:  # two may have found it stale at once: the one that wrote last has it
                time.sleep(RENEWED / 2)
                if not self.mine():
                    raise refusal(self.path.parent, read_lock(self.path))
        except BaseException:
            self._file = None
            os.close(file)
            raise

    def _system_lock(self, file: int) -> bool:
        """Whether the file system has locks; the lock is then taken."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise refusal(self.path.parent, read_lock(self.path)) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return False
        return True

    def _refuse_if_alive(self, before: dict[str, Any], elsewhere: bool) -> None:
        if not elsewhere:
            if born(before["pid"]) == before["born"]:
                raise refusal(self.path.parent, before)
            return
        deadline = time.monotonic() + STALE
        while time.monotonic() < deadline:
            time.sleep(RENEWED / 5)
            if read_lock(self.path) not in (None, before):
                raise refusal(self.path.parent, before)

    def mine(self) -> bool:
        """Whether the file says that this job has the lock."""
        found = read_lock(self.path)
        return found is not None and found["token"] == self._me["token"]

    def lost(self) -> bool:
        """Whether another job has taken it over, as happens to one that is stopped for long and then wakes.

        A file that cannot be read at this moment, as over a network, says nothing.
        """
        found = read_lock(self.path)
        return found is not None and found["token"] != self._me["token"]

    def renew(self) -> None:
        """Show that the holder lives; to be called every :data:`RENEWED` seconds."""
        self._write()

    def _write(self) -> None:
        assert self._file is not None
        own = {"time": time.time(), "inode": os.fstat(self._file).st_ino}
        text = json.dumps(self._me | own).encode().ljust(WIDTH - 1) + b"\n"
        os.pwrite(self._file, text, 0)
        os.fsync(self._file)  # over NFS, other machines see it only then

    def release(self) -> None:
        """Give the lock back."""
        if self._file is not None:
            if self.mine():
                os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = None


def read_lock(path: Path) -> dict[str, Any] | None:
    """What the holder wrote; None when the lock is free, cannot be read, or was torn by a crash of the machine."""
    for _ in range(3):  # a line that is overwritten at this moment may be seen half and half
        try:
            return json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue
    return None


def copied(path: Path) -> bool:
    """Whether a lock was copied with its folder: it then says nothing of this one."""
    found = read_lock(path)
    return found is not None and found.get("inode", path.stat().st_ino) != path.stat().st_ino


def moving(folders: Sequence[Path]) -> set[Path]:
    """Those of the run folders whose holder, on whatever machine and by whatever clock, shows that it lives."""
    before = {folder: read_lock(folder / FILE) for folder in folders}
    time.sleep(1.5 * RENEWED if before else 0.0)
    return {folder for folder, found in before.items() if found and read_lock(folder / FILE) not in (None, found)}


def refusal(folder: Path, holder: dict[str, Any] | None) -> LaunchError:
    """What a second job in ``folder`` is told."""
    who = "another job" if holder is None else f"process {holder['pid']} on {holder['host']}"
    job = f", SLURM job {holder['job']}" if holder and holder["job"] else ""
    return LaunchError(
        f"the run folder {folder} is in use by {who}{job}; wait for it, stop it, or set run.folder to another folder"
    )


def refuse_second(folder: Path) -> None:
    """For a launcher, before it touches anything: whether a live process of this machine has the folder.

    Raises:
        LaunchError: it has. Holders on other machines are found out by the ranks, which can wait.
    """
    holder = None if copied(folder / FILE) else read_lock(folder / FILE)
    here = holder is not None and holder["boot"] == boot()
    if holder is not None and here and born(holder["pid"]) == holder["born"]:
        raise refusal(folder, holder)
