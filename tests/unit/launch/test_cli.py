"""The verbs that start and show runs hand on what they are told, and give the exit code of what they have started."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from launch import cli, local
from pipeline.config import provenance
from pipeline.core.errors import LaunchError
from pipeline.record.state import State, write_state
from tests.integration.runs import SMOKE

ROOT = Path(__file__).parents[3]
ODD = "a 'b' \"c\"; $(touch oops)\nd"


@pytest.fixture
def sluice(monkeypatch, capfd):
    """Exit code, output and messages of a command, run in this process."""
    monkeypatch.setenv(provenance.COMMAND, "")  # so that what the command sets is taken back
    monkeypatch.delenv(provenance.COMMAND)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sluice", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code or 0, *capfd.readouterr()

    return run


@pytest.fixture
def started(monkeypatch):
    """What would be started, with its arguments; it ends with the code that is put in first."""
    calls: list[Any] = []

    def stand_in(name: str) -> None:
        def note(*arguments: Any) -> int:
            calls.append((name, *arguments))
            return calls[0]

        monkeypatch.setattr(local, name, note)

    for name in ("train", "train_part", "train_hosts"):
        stand_in(name)
    return calls


@pytest.mark.parametrize(
    ("how", "name"),
    [
        (["--procs", "3"], "train"),
        (["--hostfile", "hosts"], "train_hosts"),
        (["--nodes", "2", "--node-rank", "1", "--master", "127.0.0.1:29500"], "train_part"),
    ],
)
@pytest.mark.parametrize("code", [0, 1, 2, 70, 75])
def test_the_exit_code_of_a_run_is_that_of_the_command(how, name, code, tmp_path, sluice, started, monkeypatch):
    started.append(code)
    folder = tmp_path / ODD
    words = ["train", str(SMOKE / "mae.toml"), "--set", f"run.folder={json.dumps(str(folder))}", *how]
    assert sluice(*words) == (code, "", "")
    ((called, config, path, overrides, *rest),) = started[1:]
    assert (called, path, overrides) == (name, SMOKE / "mae.toml", [words[3]]) and config.run.folder == str(folder)
    told = {"train": 3, "train_hosts": Path("hosts")}
    assert rest == [told[name]] if name in told else rest[0].node == 1
    assert provenance.command()["command"] == ["sluice", *words], "so are the ranks told"
    assert not folder.exists(), "nothing is written before it is known that it runs"
    assert not list(tmp_path.rglob("oops"))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (["--hostfile", "hosts", "--procs", "2"], "--hostfile says which hosts"),
        (["--hostfile", "hosts", "--nodes", "2"], "--hostfile says which hosts"),
        (["--hostfile", "hosts", "--master", "x"], "--hostfile says which hosts"),
        (["--nodes", "2"], "several hosts need --master"),
    ],
)
def test_ways_to_start_that_exclude_each_other(how, message, tmp_path, sluice, started):
    code, out, err = sluice("train", str(SMOKE / "mae.toml"), "--set", f"run.folder='{tmp_path}/run'", *how)
    assert code == 2 and out == "" and err.startswith(f"sluice: {message}") and err.count("\n") == 1
    assert not started and not (tmp_path / "run").exists()


@pytest.fixture
def logged(tmp_path):
    """A run whose ranks 0 and 3 have printed something."""
    (tmp_path / "logs").mkdir()
    write_state(tmp_path, State("finished", 0, 12, 0))
    for rank, text in ((0, "zero\n" * 200_000), (3, "three\n")):
        (tmp_path / "logs" / f"rank-{rank:05d}.log").write_text(f"=== begin\n{text}")
    return tmp_path


# Unbuffered, Python takes a write that the reader's end has cut short for a whole one.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | {"PYTHONPATH": str(ROOT)}


def test_the_log_of_the_rank_that_is_asked_for(logged):
    command = [sys.executable, "-m", "launch", "logs", str(logged)]
    done = subprocess.run([*command, "--rank", "3"], env=ENVIRONMENT, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"=== begin\nthree\n", b"")


def test_a_reader_who_has_seen_enough_is_no_error(logged):
    command = [sys.executable, "-m", "launch", "logs", str(logged)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=ENVIRONMENT, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(4) == b"=== "
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(timeout=60) == 1


PLACE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "10.9.9.9", "MASTER_PORT": "1"}


def test_a_place_that_is_left_over_is_not_used_and_said(monkeypatch, capfd):
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    local.check_alone(os.environ)
    assert "RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment" in capfd.readouterr().err
    assert not PLACE.keys() & local.child_environment(1).keys()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "left over, too")  # of another shell: no torchrun above this process
    assert not PLACE.keys() & local.child_environment(1).keys()


def test_torchrun_places_its_ranks(tmp_path):
    code = "import json, os, sys; from launch import local; local.check_alone(os.environ)\n"
    code += "found = local.child_environment(1); print(json.dumps([found.get('RANK'), found.get('WORLD_SIZE')]))"
    (tmp_path / "rank.py").write_text(code)
    launcher = tmp_path / "torchrun"
    launcher.write_text(
        f"#!{sys.executable}\nimport subprocess, sys\nsubprocess.run([sys.executable, *sys.argv[1:]])\n"
    )
    launcher.chmod(0o755)
    environment = os.environ | PLACE | {"TORCHELASTIC_RUN_ID": "x", "PYTHONPATH": str(SMOKE.parents[1])}
    done = subprocess.run([launcher, tmp_path / "rank.py"], env=environment, capture_output=True, text=True)
    assert (json.loads(done.stdout), done.stderr) == (["1", "2"], "")


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
@pytest.mark.parametrize("command", [["train", "c.toml"], ["eval", "run", "suite.toml"], ["export", "run", "out"]])
def test_what_was_started_several_times_does_not_run_several_times(name, command, sluice, monkeypatch, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").touch()
    monkeypatch.chdir(tmp_path)
    shutil.copy(SMOKE / "mae.toml", "c.toml")
    shutil.copy(SMOKE.parent / "eval" / "glyphs.toml", "suite.toml")
    monkeypatch.setenv(name, "2")
    code, out, err = sluice(*command)
    assert (code, out) == (2, "") and "has started this command 2 times" in err and name in err


def test_a_pipe_is_read_where_it_is_read_once(sluice, tmp_path):
    text = (SMOKE / "mae.toml").read_text()
    fifo = tmp_path / "c.toml"
    os.mkfifo(fifo)
    for words, part in ((["check"], "no manifest"), (["train"], "is a pipe"), (["submit"], "is a pipe")):
        writer = threading.Thread(target=lambda: fifo.write_text(text), daemon=True)
        writer.start()
        code, _, err = sluice(*words, str(fifo))
        assert code == 2 and part in err, err
        if words == ["check"]:
            writer.join(10)


def test_a_checkpoint_needs_no_run(tmp_path):
    run, alone = tmp_path / "run", tmp_path / "best"
    inside = run / "checkpoints" / "step-00000001"
    for folder in (inside, alone):
        folder.mkdir(parents=True)
        (folder / "checkpoint.json").touch()
    (run / "config.toml").touch()
    assert cli._run_and_checkpoint(run) == (run, None)
    assert cli._run_and_checkpoint(inside) == (run, inside)
    assert cli._run_and_checkpoint(alone) == (alone, alone)
    with pytest.raises(LaunchError, match="neither a run folder nor a checkpoint"):
        cli._run_and_checkpoint(run / "none")
