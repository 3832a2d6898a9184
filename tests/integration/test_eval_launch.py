"""Ranks that evaluate, started as a user starts them: killed, none is left; and checkpoints of a run that goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.record.results import read_results
from tests.integration.runs import SMOKE, overrides
from tests.integration.test_suite_tasks import data, mae, suite_of  # noqa: F401
from tests.slurm.cluster import wait_for
from tests.unit.launch.test_supervise import alive

ROOT = Path(__file__).parents[2]


def begin(*words: str, **environment: str) -> subprocess.Popen[str]:
    own = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT, env=own, stderr=subprocess.PIPE, text=True)


def ranks_of(out: Path) -> list[int]:
    """Processes, neither of `sluice` nor of the launcher, that evaluate into a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"pipeline.run" in words[2:5] and str(out).encode() in words and entry.name.isdigit():
            found.append(int(entry.name))
    return found


@pytest.mark.parametrize("who", ["the command", "a rank"])
def test_several_ranks_that_are_killed_leave_none_behind(who, mae, data, tmp_path):  # noqa: F811
    suite, out = suite_of(tmp_path, data, 'name = "knn"\nk = [3]\non = ["good"]'), tmp_path / "out"
    words = ["eval", str(mae), str(suite), "--random-init", "--out", str(out), "--procs", "2"]
    command = begin("launch", *words)
    wait_for(lambda: len(ranks_of(out)) == 2, 120, "two ranks")
    ranks = ranks_of(out)
    os.kill(command.pid if who == "the command" else ranks[1], signal.SIGKILL)
    said = command.communicate(timeout=120)[1]
    wait_for(lambda: not any(alive(pid) for pid in ranks), 60, "the end of the ranks")
    assert command.returncode == (-signal.SIGKILL if who == "the command" else 1), said
    assert ("the evaluation died" in said) == (who == "a rank")


@pytest.mark.slow
def test_a_watch_that_is_killed_and_given_again_has_each_checkpoint_once(glyphs, tmp_path):
    """A run that trains beside it and removes nothing; what the first watch has measured stays as it is."""
    run = tmp_path / "run"
    settings = [w for o in overrides(run, glyphs / "train", "run.keep=9") for w in ("--set", o)]
    train = begin(
        "tests.slurm.slow_run", "train", "--config", str(SMOKE / "mae.toml"), *settings, SLUICE_TEST_PAUSE="1.5"
    )
    suite = tmp_path / "suite.toml"
    suite.write_text(
        f'workers = 0\n[streams]\ntrain = "{glyphs}/train"\nval = "{glyphs}/val"\n[[evals]]\nname = "knn"\nk = [3]\n'
    )
    wait_for((run / "checkpoints").exists, 120, "the beginning of the run")
    records = lambda: {p.name: p.stat().st_mtime for p in run.glob("results/*.json")}  # noqa: E731
    watch = begin("launch", "eval", "--watch", str(run), str(suite))
    wait_for(records, 240, "the first record")
    watch.kill()
    watch.communicate()
    before = records()
    assert (len(before) < 4) and train.poll() is None
    again = begin("launch", "eval", "--watch", str(run), str(suite))
    said = again.communicate(timeout=400)[1]
    assert again.returncode == 0 and train.wait(timeout=10) == 0, said
    assert [row.step for row in read_results(run).rows if row.metric == "knn/top1_k3"] == [3, 6, 9, 12]
    assert before.items() <= records().items() and len(records()) == 4
    assert f"{run} is finished" in said
