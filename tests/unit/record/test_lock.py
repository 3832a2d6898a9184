"""One job at a time in a run folder, on file systems with and without locks."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.core.errors import LaunchError
from pipeline.record import lock
from pipeline.record.lock import FILE, RunLock, read_lock

ROOT = Path(__file__).parents[3]
HOLD = """
import sys; from pathlib import Path; from pipeline.record.lock import RunLock
held = RunLock(Path(sys.argv[1])); held.take(); print("held", flush=True); sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "77"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def no_locks(monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "STALE", 0.6)
    monkeypatch.setattr(lock, "RENEWED", 0.2)


def pretend(folder, **facts):
    """Change what the holder has written."""
    found = read_lock(folder / FILE)
    assert found is not None
    (folder / FILE).write_text(json.dumps(found | facts))


def test_the_second_is_refused_and_told_who_has_it(tmp_path, other):
    with pytest.raises(LaunchError, match=rf"in use by process {other.pid} on .*, SLURM job 77; wait for it"):
        RunLock(tmp_path).take()
    found = read_lock(tmp_path / FILE)
    assert found is not None and found["pid"] == other.pid  # the first is undisturbed


def test_a_dead_holder_is_followed_at_once(tmp_path, other):
    other.kill()
    other.communicate()
    began = time.monotonic()
    held = RunLock(tmp_path)
    held.take()
    assert held.mine() and time.monotonic() - began < lock.RENEWED
    held.release()
    assert read_lock(tmp_path / FILE) is None
    again = RunLock(tmp_path)
    again.take()
    again.release()


def test_without_locks_a_live_process_of_this_machine_is_seen(tmp_path, other, no_locks, quick):
    with pytest.raises(LaunchError, match="in use"):
        RunLock(tmp_path).take()
    other.kill()
    other.communicate()
    held = RunLock(tmp_path)
    held.take()
    assert held.mine()


def test_a_process_of_the_same_number_is_not_taken_for_the_holder(tmp_path, other, no_locks, quick):
    other.kill()
    other.communicate()
    pretend(tmp_path, pid=os.getpid())
    RunLock(tmp_path).take()


def test_a_holder_on_another_machine_lives_as_long_as_it_writes(tmp_path, quick):
    first = RunLock(tmp_path)
    first.take()
    pretend(tmp_path, boot="another machine", host="node7")
    os.close(first._file)
    over = threading.Event()

    def renew():
        while not over.wait(0.1):
            pretend(tmp_path, time=time.time())

    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(LaunchError, match="on node7"):
        RunLock(tmp_path).take()
    over.set()
    thread.join()
    held = RunLock(tmp_path)
    held.take()  # nothing moves any more
    assert held.mine()


def test_who_was_taken_over_notices_and_does_not_free_the_lock_of_the_other(tmp_path):
    first = RunLock(tmp_path)
    first.take()
    pretend(tmp_path, token="the other's")
    assert not first.mine()
    first.release()
    found = read_lock(tmp_path / FILE)
    assert found is not None and found["token"] == "the other's"


def test_what_a_requeue_left_behind_is_waited_for(tmp_path, other, quick, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    threading.Timer(1.0, other.kill).start()
    held = RunLock(tmp_path)
    held.take()
    assert held.mine()


def test_it_is_not_waited_for_for_ever(tmp_path, other, quick, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setattr(lock, "LEFT_BEHIND", 0.3)
    with pytest.raises(LaunchError, match="in use"):
        RunLock(tmp_path).take()


def test_a_torn_lock_is_free(tmp_path):
    (tmp_path / FILE).write_bytes(b'{"host": "node7"')
    held = RunLock(tmp_path)
    held.take()
    assert held.mine()
