"""`sluice eval --watch`: what is evaluated and when it ends, with evaluations that only pretend and no waiting."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import evaluate, history, watch
from launch.evaluate import Wish
from launch.history import Attempt
from pipeline.core.errors import ConfigError, LaunchError
from pipeline.record.state import State, write_state
from tests.unit.launch.test_evaluations import SUITE, run_of


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    run = run_of(tmp_path / "run", 3)
    write_state(run, State("running", None, 0, 0))
    return run


def watching(run: Path, monkeypatch, codes: list[int | None], *events) -> tuple[int, list[list[str]]]:
    """The exit code, and the steps of each start of evaluations. At each wait, the next of the events happens."""
    started: list[list[str]] = []
    left = list(events)

    def start(arguments: list[str], procs: int) -> int | None:
        assert "--fleeting" in arguments and procs == 2
        started.append([word.rpartition("@")[2] for word in arguments if word.startswith(f"{run}@")])
        return codes.pop(0)

    monkeypatch.setattr(watch, "start", start)
    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=lambda seconds: left.pop(0)(), monotonic=time.monotonic))
    code = watch.watch(Wish([str(run), str(SUITE)], procs=2))
    assert not left and not codes
    return code, started


def saves(run: Path, step: int, *gone: int):
    """Another checkpoint, for which older ones go."""

    def event() -> None:
        run_of(run.parent / f"new{step}", step)
        shutil.move(run.parent / f"new{step}" / "checkpoints" / f"step-{step:08d}", run / "checkpoints")
        for old in gone:
            shutil.rmtree(run / "checkpoints" / f"step-{old:08d}")

    return event


def ends(run: Path, state: State, *before):
    def event() -> None:
        for one in before:
            one()
        write_state(run, state)

    return event


def test_each_checkpoint_once_until_the_run_has_finished(run, monkeypatch):
    last = ends(run, State("finished", 0, 12, 0), saves(run, 12))
    code, started = watching(run, monkeypatch, [0, 1, 0], saves(run, 6), lambda: None, saves(run, 9, 3, 9), last)
    assert started == [["3"], ["6"], ["12"]]  # 9 was gone before anybody saw it
    assert code == 1  # something could not be evaluated


@pytest.mark.parametrize(
    ("state", "stopped", "over"),
    [
        (State("failed", 70, 3, 0), None, True),
        (State("failed", 2, 3, 0), None, True),
        (State("failed", 1, 3, 0), None, False),
        (State("requeue", 75, 3, 0), None, False),
        (State("failed", 1, 3, 0), "stop", True),
        (State("requeue", 75, 3, 0), "stop", True),
        (State("requeue", 75, 3, 0), "requeue", False),
    ],
)
def test_what_goes_on_later_is_waited_for(state, stopped, over, run, monkeypatch, capfd):
    def ended() -> None:
        write_state(run, state)
        if stopped:
            history.append(run, Attempt("7", 0, [], "", history.now(), state.exit_code or 0, 3, stopped, ""))

    later = () if over else (ends(run, State("finished", 0, 12, 1), saves(run, 12)),)
    code, started = watching(run, monkeypatch, [0, 0][: 1 + len(later)], ended, *later)
    assert (code, started) == (0, [["3"], *([] if over else [["12"]])])
    assert ("waiting until it goes on" in capfd.readouterr().err) == (not over)


def test_evaluations_that_die_are_started_again_and_not_for_ever(run, monkeypatch):
    write_state(run, State("finished", 0, 3, 0))
    assert watching(run, monkeypatch, [None, None, 0]) == (0, [["3"]] * 3)
    assert watching(run, monkeypatch, [None, None, None]) == (1, [["3"]] * 3)
    assert watching(run, monkeypatch, [75]) == (75, [["3"]])
    assert watching(run, monkeypatch, [2]) == (2, [["3"]])


def test_what_cannot_be_watched(run, tmp_path):
    for wish in (Wish([str(run), "b", str(SUITE)]), Wish([str(run), str(SUITE)], again=True)):
        with pytest.raises(ConfigError, match="--watch takes one run and a suite"):
            watch.watch(wish)
    with pytest.raises(LaunchError, match="is no run folder"):
        watch.watch(Wish([str(tmp_path / "nowhere"), str(SUITE)]))
    assert evaluate.start is watch.start
