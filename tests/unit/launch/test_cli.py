"""The verbs that start and show runs hand on what they are told, and give the exit code of what they have started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import cli, local
from pipeline.record.state import State, write_state
from tests.integration.runs import SMOKE

ROOT = Path(__file__).parents[3]
ODD = "a 'b' \"c\"; $(touch oops)\nd"


@pytest.fixture
def sluice(monkeypatch, capfd):
    """Exit code, output and messages of a command, run in this process."""

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
    ("how", "name", "kept"),
    [
        (["--procs", "3"], "train", True),
        (["--hostfile", "hosts"], "train_hosts", True),
        (["--nodes", "2", "--node-rank", "1", "--master", "127.0.0.1:29500"], "train_part", False),
    ],
)
@pytest.mark.parametrize("code", [0, 1, 2, 70, 75])
def test_the_exit_code_of_a_run_is_that_of_the_command(how, name, kept, code, tmp_path, sluice, started):
    started.append(code)
    folder = tmp_path / ODD
    words = ["train", str(SMOKE / "mae.toml"), "--set", f"run.folder={json.dumps(str(folder))}", *how]
    assert sluice(*words) == (code, "", "")
    ((called, config, path, overrides, *rest),) = started[1:]
    assert (called, path, overrides) == (name, SMOKE / "mae.toml", [words[3]]) and config.run.folder == str(folder)
    told = {"train": 3, "train_hosts": Path("hosts")}
    assert rest == [told[name]] if name in told else rest[0].node == 1
    note = folder / "launch" / "started.json"
    assert note.exists() == kept, "of a run by hand on each host there is no one command"
    assert not kept or json.loads(note.read_text())["arguments"] == words
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
