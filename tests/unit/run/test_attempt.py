"""A start of a run: alone in its folder, watched, known by its number, and ended with a last word."""

from __future__ import annotations

import os
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch

from pipeline.config.load import load_run
from pipeline.config.resolve import resolve
from pipeline.core.errors import ConfigError, LaunchError
from pipeline.dist.group import Place
from pipeline.engine.stopping import StopRequest
from pipeline.record.beats import read_beats
from pipeline.record.lock import FILE, RunLock, read_lock
from pipeline.record.state import State, read_state, write_state
from pipeline.run import attempt as module
from tests.integration.runs import SMOKE, overrides


@pytest.fixture
def start(tmp_path, lone_group):
    """Begin an attempt in ``tmp_path / "run"``."""

    @contextmanager
    def begin(*more: str, begins: bool = True):
        path = SMOKE / "supervised.toml"
        config = load_run(path, overrides(tmp_path / "run", tmp_path / "data", *more))
        plan = resolve(config, 100, 1, str(path))
        with module.attempt(config, Place(0, 1, 0, torch.device("cpu"), timedelta(minutes=1))) as found:
            if begins:
                found.begin(plan, StopRequest(tmp_path / "run"))
            yield found

    return begin


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_folder_in_use_is_left_as_it_is(start, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    write_state(run, State("running", None, 3, 0))
    held = RunLock(run)
    held.take()
    before = contents(run)
    with pytest.raises(LaunchError, match="in use by process"), start():
        pytest.fail("two are at work")
    assert contents(run) == before and held.mine()
    held.release()


def test_attempts_are_counted_and_follow_each_other_at_once(start, tmp_path):
    run = tmp_path / "run"
    for number in (0, 1):
        with start() as attempt:
            assert attempt.number == number and read_lock(run / FILE) is not None
            assert read_beats(run)[0].attempt == number
            state = read_state(run)
            assert state is not None and (state.outcome, state.attempt) == ("running", number)
        assert read_lock(run / FILE) is None, "nobody need wait for a holder that is gone"


def test_an_error_leaves_its_code_its_rank_and_the_step_that_was_being_made(start, tmp_path):
    with pytest.raises(ValueError, match="odd"), start() as attempt:
        attempt.pulse.at("step", 7)
        raise ValueError("odd")
    state = read_state(tmp_path / "run")
    assert state is not None and (state.outcome, state.exit_code, state.rank, state.fault) == ("failed", 1, 0, 7)
    assert state.error == "rank 0: ValueError: odd"


def test_a_start_that_is_refused_changes_nothing_that_the_run_says(start, tmp_path):
    """Neither how it ended, nor where it came from, nor what it was asked."""
    run = tmp_path / "run"
    with start():
        pass
    write_state(run, State("finished", 0, 12, 0))
    (run / "stop").touch()
    kept = {name: (run / name).read_bytes() for name in ("state.json", "provenance.json", "stop")}
    with pytest.raises(ConfigError, match="not what it was"), start(begins=False) as attempt:
        assert attempt.number == 1
        raise ConfigError("not what it was")
    assert {name: (run / name).read_bytes() for name in kept} == kept
    assert read_lock(run / FILE) is None


def test_what_fails_at_the_same_step_again_and_again_is_not_started_any_more(start, tmp_path):
    for _ in range(3):
        with pytest.raises(ValueError, match="odd"), start() as attempt:
            attempt.pulse.at("step", 7)
            raise ValueError("odd")
    with pytest.raises(LaunchError, match=r"step 7 of .* has failed 3 times in a row"), start():
        pytest.fail("it is started")
    assert read_lock(tmp_path / "run" / FILE) is None


def test_it_is_watched_for_as_long_as_it_lasts(start, tmp_path, monkeypatch):
    told = []

    class Dog:
        def __init__(self, folder, pulse, floor, lock):
            told.append((folder, pulse.last.rank, floor, lock.mine()))

        def start(self):
            told.append("start")

        def stop(self):
            told.append("stop")

    monkeypatch.setattr(module, "Watchdog", Dog)
    with start("engine.hang_minutes=1.5"):
        assert told == [(tmp_path / "run", 0, 90.0, True), "start"]
    assert told[2:] == ["stop"]


def test_the_umask_of_the_user_holds(start, tmp_path):
    """Those who share a project go on with each other's runs."""
    before = os.umask(0o007)
    try:
        for _ in range(2):
            with pytest.raises(ValueError, match="odd"), start():
                raise ValueError("odd")
    finally:
        os.umask(before)
    made = list((tmp_path / "run").rglob("*"))
    assert {"lock", "state.json", "failures.jsonl", "00000"} <= {path.name for path in made}
    assert {path.stat().st_mode & 0o777 for path in made if path.is_file()} == {0o660}
    assert {path.stat().st_mode & 0o777 for path in made if path.is_dir()} == {0o770}
