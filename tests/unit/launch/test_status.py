"""Run folders as runs leave them, made by the writers that runs use; SLURM's commands are stood in for by scripts."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import cli, history, status
from launch.history import Attempt, Submitted
from launch.status import details, find_runs, read_status, table
from pipeline.core.errors import LaunchError
from pipeline.record.beats import Pulse
from pipeline.record.metrics import MetricsLog
from pipeline.record.paces import Paces, Slow
from pipeline.record.state import State, write_state

ROOT = Path(__file__).parents[3]


def log_line(step, **more):
    line = {"step": step, "samples": 8 * step, "loss": 0.5 / step, "epoch": step / 10, "step_seconds": 2.0}
    return line | {"samples_per_second": 4.0, "data_wait": 0.25} | more


@pytest.fixture
def run(tmp_path):
    """A run at step 30 of 100, whose state says that it runs, and whose two ranks are this process."""
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    (folder / "provenance.json").write_text(json.dumps({"plan": {"total_steps": 100}, "folder": str(tmp_path)}))
    lines = MetricsLog(folder)
    for step in (10, 20, 30):
        lines.append(log_line(step))
    lines.close()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "samp')  # killed in the middle of a line
    (folder / "checkpoints" / "step-00000020").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000030.tmp").mkdir()
    write_state(folder, State("running", None, 20, 0))
    beat(folder, 0)
    beat(folder, 1)
    return folder


def beat(folder, rank, step=31, phase="step", **changed):
    """A rank's last words, with some of them ``changed``."""
    pulse = Pulse(folder, rank, 0)
    pulse.at(phase, step)
    pulse.close()
    path = folder / "beats" / f"{rank:05d}"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(json.dumps(json.loads(first) | changed).encode().ljust(len(first) - 1) + b"\n" + second)


def only(folder):
    return read_status([folder])[0]


def test_a_run_at_work(run):
    found = only(run)
    assert (found.phase, found.line["step"], found.total_steps) == ("running", 30, 100)
    assert found.left == 140.0
    assert found.checkpoint is not None and found.checkpoint[0] == 20 and found.checkpoint[1] < 60
    assert details(found).splitlines() == [
        f"{run}: running",
        "  step        30 of 100 (30%), 240 samples, epoch 3",
        "  loss        0.01667",
        "  speed       4 images/s, data wait 25%, 2 m 20 s left",
        f"  checkpoint  step 20, {details(found).split('step 20, ')[1]}",
    ]


@pytest.mark.parametrize(
    ("state", "phase", "detail"),
    [
        (State("finished", 0, 100, 0), "finished", ""),
        (State("failed", 70, 31, 0, "loss is nan"), "failed", "exit code 70, not finite"),
        (State("failed", 2, 31, 0, "no shards"), "failed", "exit code 2, something to mend"),
        (State("failed", 1, 31, 0, "boom"), "failed", "exit code 1, a crash"),
        (State("requeue", 75, 31, 0), "saved", "at step 31 (exit code 75); `sluice resume` goes on"),
    ],
)
def test_a_run_that_ended(run, state, phase, detail):
    write_state(run, state)
    found = only(run)
    assert (found.phase, found.detail, found.left) == (phase, detail, None)
    assert list(found.errors) == ([state.error] if state.error else [])


def gone():
    """A process id that is free."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


def test_a_run_that_died_without_a_word(run):
    for rank in (0, 1):
        beat(run, rank, pid=gone())
    assert only(run).phase == "died"
    beat(run, 1, host="elsewhere", time=time.time() - 60)
    assert only(run).phase == "running"
    beat(run, 1, host="elsewhere", time=time.time() - 2 * status.SILENT_SECONDS)
    assert only(run).phase == "died"
    beat(run, 1, host="elsewhere", time=time.time() - 2 * status.SILENT_SECONDS, step_seconds=300.0)
    assert only(run).phase == "running"  # its steps are long


def test_the_rank_that_the_others_wait_for(run):
    beat(run, 2, host="n7", step=29, phase="data", time=time.time() - 90)
    assert only(run).behind.startswith("rank 2 on n7: in 'data' of step 29 of 31 for 1 m 30 s")
    beat(run, 2, step=31, phase="data")
    assert only(run).behind.startswith(f"rank 2 on {socket.gethostname()}: in 'data' of step 31 of 31")
    beat(run, 2)
    assert only(run).behind == ""


def test_errors_are_told_by_rank(run):
    (run / "logs").mkdir()
    for rank, text in enumerate(["RuntimeError: peer", "RuntimeError: peer", "ValueError: cause", "all is well"]):
        (run / "logs" / f"rank-{rank:05d}.log").write_text(f"=== rank {rank}\nValueError: old\n=== rank\n{text}\nx\n")
    write_state(run, State("failed", 1, 31, 0, "peer"))
    assert only(run).errors == {"RuntimeError: peer": [0, 1], "ValueError: cause": [2]}
    assert details(only(run)).splitlines()[-2:] == [
        "  error       ranks 0, 1: RuntimeError: peer",
        "  error       rank 2: ValueError: cause",
    ]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stands in for squeue and scancel: jobs and states from a file, arguments into another."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("squeue", "scancel"):
        (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {folder}/said\ncat {folder}/queue\n')
        (folder / name).chmod(0o755)
    (folder / "queue").write_text("")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def submitted(run, job="7"):
    entry = Submitted(history.now(), job, "big", 2, "1:00:00", "c.toml", ["submit", "c.toml", "--nodes", "2"])
    history.append(run, entry)


def test_a_run_in_the_queue(tmp_path, slurm):
    run = tmp_path / "runs" / "new"
    submitted(run, "6")
    submitted(run)
    (slurm / "queue").write_text("7 7 7 PENDING\n")
    assert (only(run).phase, only(run).detail) == ("queued", "SLURM job 7 is pending")
    assert "--me" in (slurm / "said").read_text()
    (slurm / "queue").write_text("")
    assert (only(run).phase, only(run).detail) == ("not started", "SLURM job 7 is gone from the queue")


def test_a_run_that_was_queued_again(run, slurm):
    submitted(run)
    for number, decision in enumerate(["restart", "requeue", "requeue"]):
        t = history.now()
        history.append(run, Attempt("7", number, ["n1"], t, t, 1, 31, decision, "it crashed"))
    (slurm / "queue").write_text("7 9 7_0 RUNNING\n8 8 8 RUNNING\n")
    assert (only(run).phase, only(run).detail) == ("running", "SLURM job 7 is running; requeued 2 times")


def test_why_a_job_was_not_started_again(run, slurm):
    submitted(run)
    write_state(run, State("failed", 1, 31, 0, "boom"))
    t = history.now()
    history.append(run, Attempt("7", 0, ["n1"], t, t, 1, 31, "stop", "failed 3 times in a row at step 31"))
    assert "  stopped     failed 3 times in a row at step 31" in details(only(run)).splitlines()
    submitted(run, "8")
    (slurm / "queue").write_text("8 8 8 PENDING\n")
    assert "stopped" not in details(only(run))


def test_a_job_that_ended_before_it_could_say_anything(tmp_path, slurm):
    run = tmp_path / "runs" / "new"
    submitted(run)
    assert only(run).stopped == ""
    log = run / "launch" / "slurm-7.out"
    log.write_text("module: command not found\nerror: no such module\n\n")
    assert only(run).stopped == f"{log} ends with: error: no such module"


def test_slurm_that_does_not_answer(run, slurm):
    submitted(run)
    (slurm / "squeue").write_text("#!/bin/sh\necho no controller >&2\nexit 1\n")
    with pytest.raises(LaunchError, match="squeue refused: no controller"):
        read_status([run])


def test_runs_are_found(run, tmp_path):
    other = tmp_path / "runs" / "deep" / "down"
    other.mkdir(parents=True)
    write_state(other, State("finished", 0, 5, 0))
    (run / "checkpoints" / "state.json").write_text("{}")  # not looked for inside a run
    assert find_runs(tmp_path / "runs") == [other, run]
    assert find_runs(tmp_path / "none") == []
    lines = table(read_status(find_runs(tmp_path / "runs"))).splitlines()
    assert [line.split() for line in lines] == [
        ["run", "state", "step", "loss", "images/s", "left"],
        [str(other), "finished", "-", "-", "-", "-"],
        [str(run), "running", "30/100", "0.01667", "4", "2", "m", "20", "s"],
    ]


def test_a_folder_that_is_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sluice", "status", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2 and "is no run folder" in capsys.readouterr().err


def test_it_is_shown_again(run, tmp_path):
    command = [sys.executable, "-m", "launch", "status", "--watch"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        heads = [line for line, _ in zip(process.stdout, range(6), strict=False) if "running" in line]
        process.terminate()
    assert len(heads) == 1


@pytest.mark.parametrize("words", [["status"], ["logs", "runs/one"], ["cancel", "runs/one"], ["--help"]])
def test_no_framework_is_imported(run, tmp_path, words):
    (run / "logs").mkdir()
    (run / "logs" / "rank-00000.log").touch()
    heavy = ["torch", "deepspeed", "numpy", "timm", "webdataset", "matplotlib", "sklearn", "PIL"]
    code = (
        "import sys; from launch import cli\n"
        f"sys.argv = ['sluice', *{words!r}]\n"
        "try:\n    cli.main()\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
        f"found = set({heavy!r}) & set(sys.modules); assert not found, found"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_ranks_own_times_are_shown_while_it_runs(run):
    own = [(0.01, 0.5, 0.0, 0.0), (0.01, 0.9, 0.0, 0.0)]
    Paces(0, 30, 1.0, ["n1", "n2"], own, [Slow(1, "n2", 78.4, "step", 20)]).write(run)
    assert details(only(run)).splitlines()[-4:] == [
        "  each rank's own seconds a step, without what it waited for others, up to step 30",
        "    rank  node  data  step  checkpoint  other",
        '    1     n2    0.01  0.9   0           0      slow in "step", +78 %',
        "    0     n1    0.01  0.5   0           0",
    ]
    write_state(run, State("finished", 0, 100, 0))
    assert "each rank" not in details(only(run))
