import errno
import json

import pytest

from pipeline.record.state import State, close_state, read_state, write_state


def test_what_is_written_is_read_with_its_time(tmp_path):
    assert read_state(tmp_path) is None
    write_state(tmp_path, State("running", None, 7, 1))
    state = read_state(tmp_path)
    assert state is not None
    assert state == State("running", None, 7, 1, None, json.loads((tmp_path / "state.json").read_text())["time"])
    assert state.time.endswith("+00:00")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"outcome": "running"}'])
def test_an_entry_that_cannot_be_read_is_none(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    assert read_state(tmp_path) is None


def test_the_first_rank_to_say_how_it_ended_is_believed(tmp_path):
    write_state(tmp_path, State("running", None, 7, 1))
    close_state(tmp_path, "failed", 70, error="loss is nan")
    close_state(tmp_path, "failed", 1, step=9, error="connection reset")
    state = read_state(tmp_path)
    assert state is not None
    assert (state.outcome, state.exit_code, state.step, state.attempt, state.error) == (
        "failed",
        70,
        7,
        1,
        "loss is nan",
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_on_a_full_disk_it_is_written_over_the_last_one(tmp_path, monkeypatch, number):
    write_state(tmp_path, State("running", None, 7, 1, error="x" * 200))
    inode = (tmp_path / "state.json").stat().st_ino

    def full(*args):
        raise OSError(number, "no room")

    monkeypatch.setattr("pipeline.record.state.replace_file", full)
    close_state(tmp_path, "failed", 2, error="full", rank=1, fault=8)
    state = read_state(tmp_path)
    assert state is not None and (state.exit_code, state.error, state.rank, state.fault) == (2, "full", 1, 8)
    assert (tmp_path / "state.json").stat().st_ino == inode


def test_the_end_names_its_step(tmp_path):
    write_state(tmp_path, State("running", None, 7, 1))
    close_state(tmp_path, "finished", 0, step=9)
    state = read_state(tmp_path)
    assert state is not None and (state.outcome, state.step, state.error) == ("finished", 9, None)
