"""`sluice sweep` with runs that pretend to train: nothing is lost and nothing done twice, whatever happens to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import tomli_w

from launch.supervise import session_members
from pipeline.config import load
from pipeline.record.state import read_state
from tests.integration.runs import SMOKE
from tests.unit.launch import fake_sweep
from tests.unit.launch.fake_sweep import loss_of

ROOT = Path(__file__).parents[3]
LRS = (1e-4, 0.5)
SEEDS = (0, 1)
NAMES = [f"lr={lr},seed={seed}" for lr in ("1e-4", "0.5") for seed in SEEDS]


@pytest.fixture
def place(tmp_path: Path, glyphs: Path) -> Path:
    """A folder with a sweep of four runs."""
    write(tmp_path, glyphs)
    return tmp_path


def write(place: Path, glyphs: Path, lrs: Sequence[float] = LRS, **more: object) -> None:
    values = {
        "base": [str(SMOKE / "mae.toml")],
        "run": {"folder": "runs", "length": "6ba"},
        "data": {"train": str(glyphs / "train")},
        "sweep": {"grid": {"optimizer": {"lr": list(lrs)}}, "seeds": list(SEEDS)} | more,
    }
    (place / "sweep.toml").write_text(tomli_w.dumps(values))


def begin(place: Path, *words: str, pause: float = 0.0) -> subprocess.Popen[str]:
    """A sweep in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), fake_sweep.PAUSE: str(pause)}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.unit.launch.fake_sweep", "sweep", "sweep.toml", *words],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def done(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def counted(place: Path, what: str) -> list[int]:
    """How often each run did something."""
    files = [place / "runs" / name / what for name in NAMES]
    return [len(file.read_text().splitlines()) if file.exists() else 0 for file in files]


def until_steps(place: Path, name: str, steps: int) -> None:
    deadline = time.monotonic() + 60
    file = place / "runs" / name / "steps"
    while not file.exists() or len(file.read_text().splitlines()) < steps:
        assert time.monotonic() < deadline, f"{name} did not make step {steps}"
        time.sleep(0.01)


def rows(out: str) -> list[list[str]]:
    return [line.split() for line in out.split("\n\n")[0].splitlines()]


def test_every_run_once_and_a_table_of_all(place):
    code, out, err = done(begin(place))
    assert code == 0, err
    wanted = [[n, "finished", "6", f"{loss_of(lr, seed, 6):.4g}"] for n, (lr, seed) in zip(NAMES, pairs(), strict=True)]
    assert rows(out) == [["run", "state", "step", "loss"], *wanted]
    means = [line.split()[:6] for line in out.split("\n\n")[1].splitlines()[1:]]
    assert [line[:4] for line in means] == [["lr=1e-4", "2", "finished", "6"], ["lr=0.5", "2", "finished", "6"]]
    assert float(means[1][4]) == pytest.approx((loss_of(0.5, 0, 6) + loss_of(0.5, 1, 6)) / 2, abs=5e-4)
    for name, (lr, seed) in zip(NAMES, pairs(), strict=True):
        config = load.load_run(place / "runs" / name / "launch" / "sweep.toml")
        assert (config.optimizer.lr, config.run.seed, config.run.folder) == (lr, seed, f"runs/{name}")
    again = done(begin(place))
    assert again[:2] == (0, out) and counted(place, "starts") == [1, 1, 1, 1]


def pairs() -> list[tuple[float, int]]:
    return [(lr, seed) for lr in LRS for seed in SEEDS]


def test_killed_in_the_middle_and_given_again_it_ends_with_the_same_table(place, glyphs, tmp_path_factory):
    """A real SIGKILL, in the middle of the second run; nothing of it is left, and no step is made twice."""
    other = tmp_path_factory.mktemp("whole")
    write(other, glyphs)
    whole = done(begin(other))[1]
    sweep = begin(place, pause=0.1)
    until_steps(place, NAMES[1], 3)
    pid = int((place / "runs" / NAMES[1] / "steps").read_text().splitlines()[-1])
    session = os.getsid(pid)
    sweep.kill()
    sweep.communicate()
    deadline = time.monotonic() + 20
    while session_members(session):
        assert time.monotonic() < deadline, "the run goes on without the sweep"
        time.sleep(0.02)
    state = read_state(place / "runs" / NAMES[1])
    assert state is not None and state.outcome == "running" and counted(place, "starts") == [1, 1, 0, 0]
    code, out, err = done(begin(place))
    assert (code, out) == (0, whole), err
    assert counted(place, "starts") == [1, 2, 1, 1] and counted(place, "steps") == [6, 6, 6, 6]


def test_two_at_once_share_the_runs_and_their_evaluations(place, glyphs):
    """Neither does what the other does or has done, and both end with the whole table."""
    write(place, glyphs, suite=str(ROOT / "configs" / "eval" / "glyphs.toml"))
    both = [begin(place, pause=0.05) for _ in range(2)]
    ended = [done(process) for process in both]
    assert [code for code, _, _ in ended] == [1, 1] and ended[0][1] == ended[1][1]  # two evaluations fail
    assert counted(place, "starts") == [1, 1, 1, 1] and counted(place, "steps") == [6, 6, 6, 6]
    assert counted(place, "evaluations") == [1, 1, 1, 1]
    assert all(len(rows(out)) == 5 for _, out, _ in ended)


def test_asked_to_stop_it_saves_and_goes_on_later(place):
    sweep = begin(place, pause=0.1)
    until_steps(place, NAMES[0], 2)
    sweep.send_signal(signal.SIGTERM)
    code, out, _ = done(sweep)
    assert code == 75 and "not begun: lr=1e-4,seed=1, lr=0.5,seed=0, lr=0.5,seed=1" in out
    assert done(begin(place))[0] == 0
    assert counted(place, "starts") == [2, 1, 1, 1] and counted(place, "steps") == [6, 6, 6, 6]


def test_what_failed_for_good_is_told_and_not_tried_again_unasked(place, glyphs):
    write(place, glyphs, lrs=(1e6, 0.5))
    first = done(begin(place))
    assert first[0] == 1
    table = first[1].split("\n\n")[-1].splitlines()
    assert table[0] == "failed: 2 of 4"
    assert table[1].split("  ")[1:] == ["lr=1e6,seed=0", "exit code 70: step 1: the loss of rank 0 is nan"]
    bad = place / "runs" / "lr=1e6,seed=0" / "starts"
    assert done(begin(place))[:2] == first[:2] and len(bad.read_text().splitlines()) == 1
    assert done(begin(place, "--retry"))[:2] == first[:2] and len(bad.read_text().splitlines()) == 2


def test_a_suite_is_evaluated_once_after_each_run(place, glyphs, tmp_path):
    """One that fails is told with its reason, does not disturb the others, and is tried again when asked to."""
    suite = ROOT / "configs" / "eval" / "glyphs.toml"
    write(place, glyphs, suite=str(suite))
    code, out, _ = done(begin(place))
    assert code == 1 and counted(place, "evaluations") == [1, 1, 1, 1]
    assert rows(out)[3] == ["lr=0.5,seed=0", "finished", "6", "0.1538", "0.50", "+-", "0.50"]
    assert out.count("exit code 2: evaluation: the stream 'val' has no labels (all of it: runs/") == 2
    assert done(begin(place))[:2] == (1, out) and counted(place, "evaluations") == [1, 1, 1, 1]
    assert done(begin(place, "--retry"))[0] == 1 and counted(place, "evaluations") == [1, 2, 1, 2]
    assert counted(place, "starts") == [1, 1, 1, 1]


def test_a_dry_run_does_nothing(place):
    done(begin(place))
    (place / "runs" / NAMES[0] / "state.json").unlink()
    code, out, _ = done(begin(place, "--dry-run", "--set", "sweep.seeds=[0, 1, 2]"))
    assert code == 0 and counted(place, "starts") == [1, 1, 1, 1]
    said = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in out.splitlines()[:6]}
    assert said[NAMES[0]] == "would be trained" and said[NAMES[1]] == "has finished"
    assert said["lr=0.5,seed=2"] == "would be trained" and not (place / "runs" / "lr=0.5,seed=2").exists()


def test_all_mistakes_of_all_runs_at_once_before_anything_starts(place, glyphs):
    write(place, glyphs, lrs=(0.5, -1.0, 0.0), suite="nowhere.toml")
    code, out, err = done(begin(place, "--set", "engine.micro_bach=3"))
    assert code == 2 and out == "" and not (place / "runs").exists()
    lines = err.splitlines()
    assert lines[0].endswith("3 mistakes") and "Traceback" not in err
    assert "engine.micro_bach: unknown key (did you mean 'micro_batch'?)" in lines[1]
    assert lines[2].startswith("  lr=-1.0,seed=0 and lr=-1.0,seed=1: optimizer.lr: expected a number > 0.0, found -1.0")
    write(place, glyphs, suite="nowhere.toml")
    assert "sweep.suite: cannot read nowhere.toml" in done(begin(place))[2]


def test_a_finished_run_is_not_taken_for_another(place):
    assert done(begin(place))[0] == 0
    code, _, err = done(begin(place, "--set", "objective.mask_ratio=0.5"))
    assert (
        code == 2 and "runs/lr=1e-4,seed=0 has finished as another run: objective.mask_ratio: 'absent', now 0.5" in err
    )
    assert done(begin(place, "--set", "data.workers=1"))[0] == 0 and counted(place, "starts") == [1, 1, 1, 1]
