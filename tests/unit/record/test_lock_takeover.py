"""Who may take a lock over, and who is told that it is in use, where the holder may be dead."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.core.errors import LaunchError
from pipeline.record import lock
from pipeline.record.lock import FILE, RunLock, read_lock, refuse_second
from tests.unit.record.test_lock import ROOT, no_locks, other, pretend, quick  # noqa: F401


def test_without_slurm_nobody_is_waited_for(tmp_path, other, monkeypatch):  # noqa: F811
    """Neither process is of a job, which does not make them parts of the same one."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    pretend(tmp_path, job=None)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: pytest.fail("waits"))
    with pytest.raises(LaunchError, match="in use"):
        RunLock(tmp_path).take()


def test_of_two_that_find_it_stale_the_one_that_wrote_last_has_it(tmp_path, no_locks, quick, monkeypatch):  # noqa: F811
    first = RunLock(tmp_path)
    first.take()
    pretend(tmp_path, boot="another machine")
    pauses = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        found = read_lock(tmp_path / FILE)
        if found is not None and found["boot"] != "another machine":  # just written by the one that takes it
            pretend(tmp_path, token="the other's", host="node7")

    monkeypatch.setattr(lock.time, "sleep", sleep)
    monkeypatch.setattr(lock, "STALE", 0.0)
    with pytest.raises(LaunchError, match="on node7"):
        RunLock(tmp_path).take()
    assert pauses


def test_a_lock_that_cannot_be_read_for_a_moment_is_no_sign_of_life(tmp_path, quick, monkeypatch):  # noqa: F811
    first = RunLock(tmp_path)
    first.take()
    pretend(tmp_path, boot="another machine")
    os.close(first._file)
    read, answers = lock.read_lock, []

    def sometimes(path):
        answers.append(None if len(answers) == 1 else read(path))
        return answers[-1]

    monkeypatch.setattr(lock, "read_lock", sometimes)
    held = RunLock(tmp_path)
    held.take()
    assert held.mine()


def test_a_launcher_refuses_only_for_a_live_process_of_this_machine(tmp_path):
    refuse_second(tmp_path)
    held = RunLock(tmp_path)
    held.take()
    with pytest.raises(LaunchError, match=f"process {os.getpid()} on "):
        refuse_second(tmp_path)
    pretend(tmp_path, born="long ago")  # a process that had this number before
    refuse_second(tmp_path)
    pretend(tmp_path, born=lock.born(os.getpid()), boot="another machine")
    refuse_second(tmp_path)
    pretend(tmp_path, boot=lock.boot(), pid=2**22 + 1)
    refuse_second(tmp_path)


def test_the_holder_shows_that_it_lives(tmp_path):
    held = RunLock(tmp_path)
    held.take()
    pretend(tmp_path, time=0.0)
    held.renew()
    found = read_lock(tmp_path / FILE)
    assert found is not None and found["time"] > 0 and held.mine()


def test_each_word_of_the_holder_is_sent_to_where_other_machines_read_it(tmp_path, monkeypatch):
    """Over NFS, what is only written stays with the machine that has written it."""
    seen = []
    monkeypatch.setattr(lock.os, "fsync", lambda descriptor: seen.append((tmp_path / FILE).read_bytes()))
    held = RunLock(tmp_path)
    held.take()
    held.renew()
    assert len(set(seen)) == 2 and seen[-1] == (tmp_path / FILE).read_bytes()


def test_a_longer_word_of_the_holder_before_leaves_nothing(tmp_path):
    (tmp_path / FILE).write_bytes(json.dumps({"boot": lock.boot(), "pid": 2**22 + 1, "host": "n" * 300}).encode())
    held = RunLock(tmp_path)
    held.take()
    assert held.mine()


def test_a_word_that_is_read_while_it_is_written_is_read_again(tmp_path, monkeypatch):
    RunLock(tmp_path).take()
    read, torn = Path.read_bytes, [b"", b'{"host": "no']
    monkeypatch.setattr(Path, "read_bytes", lambda path: torn.pop() if torn else read(path))
    found = read_lock(tmp_path / FILE)
    assert found is not None and found["pid"] == os.getpid()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL])
def test_file_systems_without_locks(tmp_path, monkeypatch, number):
    def refuse(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: None)
    held = RunLock(tmp_path)
    held.take()
    assert held.mine()


def test_what_is_wrong_with_a_file_is_not_taken_for_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*args: object) -> None:
        raise OSError(errno.EIO, "disk is broken")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with pytest.raises(OSError, match="disk is broken"):
        RunLock(tmp_path).take()
    assert not (tmp_path / FILE).read_bytes()


def test_a_lock_that_was_given_back_is_not_given_back_twice(tmp_path):
    held = RunLock(tmp_path)
    held.take()
    held.release()
    again = RunLock(tmp_path)
    again.take()
    held.release()
    assert json.loads((tmp_path / FILE).read_bytes())["token"] == again._me["token"]


def test_only_another_s_name_in_the_file_says_that_it_is_lost(tmp_path):
    held = RunLock(tmp_path)
    held.take()
    assert held.mine() and not held.lost()
    written = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).unlink()
    assert not held.mine() and not held.lost()
    (tmp_path / FILE).write_bytes(written)
    pretend(tmp_path, token="the other's")
    assert not held.mine() and held.lost()


def test_a_copy_of_a_run_at_work_is_free(tmp_path):
    run, copy = tmp_path / "run", tmp_path / "copy"
    run.mkdir()
    held = RunLock(run)
    held.take()
    shutil.copytree(run, copy)
    assert lock.copied(copy / FILE) and not lock.copied(run / FILE)
    refuse_second(copy)
    second = RunLock(copy)
    second.take()
    assert held.mine() and second.mine()
    run.rename(tmp_path / "moved")  # while it is at work
    with pytest.raises(LaunchError, match=f"process {os.getpid()} on "):
        refuse_second(tmp_path / "moved")


def test_a_process_that_is_dead_but_not_collected_holds_nothing(tmp_path):
    code = "import sys; from pathlib import Path; from pipeline.record.lock import RunLock; import time\n"
    code += "held = RunLock(Path(sys.argv[1])); held.take(); print('held', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and a zombie
    assert (Path("/proc") / str(process.pid)).exists()
    refuse_second(tmp_path)
    RunLock(tmp_path).take()
    process.communicate()


def test_children_of_a_killed_rank_are_waited_for(tmp_path, quick):  # noqa: F811
    """They have its file, and so its lock, until they notice."""
    code = "import os, sys, time; from pathlib import Path; from pipeline.record.lock import RunLock\n"
    code += "held = RunLock(Path(sys.argv[1])); held.take(); sys.stdout.flush()\n"
    code += "child = os.fork()\nif not child: print('held', flush=True); time.sleep(1.5); os._exit(0)\ntime.sleep(600)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    process.kill()
    process.wait()
    held = RunLock(tmp_path)
    held.take()
    assert held.mine()
    process.communicate()


def test_who_moves_is_seen_without_a_clock(tmp_path, quick):  # noqa: F811
    dead, live = tmp_path / "dead", tmp_path / "live"
    for folder in (dead, live):
        folder.mkdir()
        held = RunLock(folder)
        held.take()
        pretend(folder, boot="another machine", time=0.0)
    over = threading.Event()
    thread = threading.Thread(target=lambda: [pretend(live, time=n) for n in range(1000) if not over.wait(0.05)])
    thread.start()
    assert lock.moving([dead, live, tmp_path / "none"]) == {live}
    over.set()
    thread.join()
