import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import history
from launch.control import cancel, read_log, resume_command
from launch.history import Attempt, Submitted
from pipeline.core.errors import LaunchError
from pipeline.record.state import State, write_state
from tests.unit.launch.test_status import beat, gone, run, slurm, submitted  # noqa: F401

ROOT = Path(__file__).parents[3]


def sluice(*words, **more):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", "launch", *words], env=environment, text=True, **more)


def test_the_log_of_the_last_attempt(run):  # noqa: F811
    (run / "logs").mkdir()
    (run / "logs" / "rank-00002.log").write_text("=== first\na\n=== second\nb\n")
    assert b"".join(read_log(run, 2, follow=False)) == b"=== second\nb\n"
    with pytest.raises(LaunchError, match=r"rank 1 of .* has no log; ranks 0 to 2 have one"):
        list(read_log(run, 1, follow=False))


def test_a_log_is_followed(run):  # noqa: F811
    (run / "logs").mkdir()
    log = run / "logs" / "rank-00000.log"
    log.write_text("=== now\n")
    with sluice("logs", str(run), "--follow", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == "=== now\n"
        with open(log, "a") as file:
            file.write("later\n")
        assert process.stdout.readline() == "later\n"  # hangs if it does not follow
        process.terminate()


def test_a_run_here_is_asked_by_its_stop_file(run):  # noqa: F811
    assert "asked to stop" in cancel(run)
    assert (run / "stop").exists()


def test_a_job_is_cancelled_by_slurm(run, slurm):  # noqa: F811
    submitted(run)
    (slurm / "queue").write_text("7 7 7 PENDING\n")
    assert cancel(run) == "SLURM job 7 is cancelled"
    assert (slurm / "said").read_text().splitlines()[-1] == "scancel 7"
    assert not (run / "stop").exists()


def test_a_job_that_trains_may_take_its_time_to_save(run, slurm):  # noqa: F811
    submitted(run)
    (slurm / "queue").write_text("7 7 7 RUNNING\n")
    assert "SLURM job 7 is asked to save and end" in cancel(run)
    assert history.asked_to_end(run, "7") and not history.asked_to_end(run, "8")
    assert "scancel" not in (slurm / "said").read_text()
    assert cancel(run) == "SLURM job 7 is cancelled"
    assert (slurm / "said").read_text().splitlines()[-1] == "scancel 7"


def test_a_run_here_is_not_taken_for_a_job_that_it_once_was(run, slurm):  # noqa: F811
    submitted(run, "1")
    t = history.now()
    history.append(run, Attempt("1", 0, ["n1"], t, t, 75, 30, "requeue", "asked to stop, and saved"))
    assert "asked to stop" in cancel(run)
    assert (run / "stop").exists() and "scancel" not in (slurm / "said").read_text()


def test_nothing_to_cancel(run):  # noqa: F811
    write_state(run, State("finished", 0, 100, 0))
    with pytest.raises(LaunchError, match="neither queued nor running: finished"):
        cancel(run)
    assert not (run / "stop").exists()


def began(folder, *words, where="/somewhere", time="2026"):
    facts = json.loads((folder / "provenance.json").read_text())
    facts |= {"time": time, "folder": where, "command": ["sluice", *words]}
    (folder / "provenance.json").write_text(json.dumps(facts))


def test_the_command_that_began_a_run_goes_on_with_it(run, slurm, tmp_path):  # noqa: F811
    write_state(run, State("requeue", 75, 31, 0))
    with pytest.raises(LaunchError, match=r"nobody noted how .*config\.toml and --set run\.folder"):
        resume_command(run)
    began(run, "train", "a b.toml", "--set", "x=$(y)")
    assert resume_command(run) == ("/somewhere", ["train", "a b.toml", "--set", "x=$(y)"])
    (run / "config.toml").touch()  # from now on it is the folder's own configuration that counts
    own = ["train", str(run / "config.toml"), "--set", f'run.folder="{run}"']
    assert resume_command(run) == ("/somewhere", own)
    began(run, "train", "--procs=2", "a b.toml", "--set=x=1", "--hostfile", "h", "--set", "y=2")
    assert resume_command(run)[1] == [*own, "--procs=2", "--hostfile", "h"]
    submitted(run)
    assert resume_command(run)[1] == ["submit", *own[1:], "--nodes", "2"]
    began(run, "train", "c.toml", time="2999")
    assert resume_command(run)[1] == own


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_another_folder_goes_on_with_itself(run, slurm, tmp_path, how):  # noqa: F811
    write_state(run, State("requeue", 75, 31, 0))
    began(run, "train", "c.toml", "--procs", "2", where=str(tmp_path))
    (run / "config.toml").touch()
    other = run.with_name("two")
    if how == "moved":
        run.rename(other)
    else:
        shutil.copytree(run, other)
    words = ["train", str(other / "config.toml"), "--set", 'run.folder="runs/two"', "--procs", "2"]
    assert resume_command(other) == (str(tmp_path), words)


def test_the_job_of_another_folder_is_not_cancelled(run, slurm):  # noqa: F811
    """Of a copy, or of one whose job's number was given out again."""
    entry = Submitted(history.now(), "7", "big", 2, None, "c.toml", ["submit"], "sluice-one", str(run.resolve()))
    history.append(run, entry)
    (slurm / "queue").write_text("7 7 7 RUNNING sluice-one\n")
    copy = run.with_name("two")
    shutil.copytree(run, copy)
    write_state(copy, State("finished", 0, 100, 0))
    with pytest.raises(LaunchError, match="neither queued nor running: finished"):
        cancel(copy)
    assert "asked to save" in cancel(run)
    (slurm / "queue").write_text("7 7 7 RUNNING sluice-another\n")
    write_state(run, State("finished", 0, 100, 0))
    with pytest.raises(LaunchError, match="neither queued nor running: finished"):
        cancel(run)
    assert "scancel" not in (slurm / "said").read_text()


def test_a_run_at_work_is_not_resumed(run, slurm):  # noqa: F811
    with pytest.raises(LaunchError, match="is running: nothing to resume"):
        resume_command(run)
    write_state(run, State("finished", 0, 100, 0))
    with pytest.raises(LaunchError, match="is finished: nothing to resume"):
        resume_command(run)
    submitted(run)
    (slurm / "queue").write_text("7 7 7 PENDING\n")
    with pytest.raises(LaunchError, match="is queued, SLURM job 7 is pending: nothing"):
        resume_command(run)


def test_resume_becomes_the_command(run, tmp_path):  # noqa: F811
    for rank in (0, 1):
        beat(run, rank, pid=gone())
    began(run, "train", "no such.toml", where=str(tmp_path))
    with sluice("resume", str(run), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out == f"in {tmp_path}: sluice train 'no such.toml'\n" and "no such.toml" in err


def test_tensorboard_listens_to_this_machine_alone(run):  # noqa: F811
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with sluice("board", str(run), "--port", str(port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        deadline = time.monotonic() + 120
        while not (found := listening(port)):
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        server.terminate()
    assert found == {"0100007F"}


def listening(port):
    """Addresses, as /proc shows them, at which somebody listens at the port."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port}
