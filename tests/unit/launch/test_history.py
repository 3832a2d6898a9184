"""The history of a run's jobs survives a kill, and strangers in its file."""

from __future__ import annotations

from launch import history
from launch.history import Attempt, Submitted

SUBMITTED = Submitted("2026-01-01T00:00:00+00:00", "7", "alps", 2, "1:00:00", "c.toml", ["submit", "c.toml"])
ATTEMPT = Attempt("7", 1, ["n1", "n2"], "a", "b", 137, 4, "requeue", "crashed; n2: is down", ["n2"])


def test_what_is_written_is_read(tmp_path):
    assert history.read(tmp_path) == [] and history.last_job(tmp_path) is None
    for entry in (SUBMITTED, ATTEMPT):
        history.append(tmp_path, entry)
    assert history.read(tmp_path) == [SUBMITTED, ATTEMPT]
    assert history.attempts(tmp_path) == [ATTEMPT]
    assert history.last_job(tmp_path) == "7"


def test_torn_and_unknown_lines_are_left_out(tmp_path):
    history.append(tmp_path, SUBMITTED)
    file = tmp_path / history.FOLDER / history.FILE
    file.write_text(file.read_text() + '{"kind": "other"}\n[]\n{"kind": "attempt"}\n{"kind": "att')
    history.append(tmp_path, ATTEMPT)
    assert history.read(tmp_path) == [SUBMITTED, ATTEMPT]


def test_bad_nodes_add_up(tmp_path):
    assert history.bad_nodes(tmp_path) == {}
    history.add_bad_nodes(tmp_path, {"n1": "is down"})
    history.add_bad_nodes(tmp_path, {"n2": "is slow"})
    assert history.bad_nodes(tmp_path) == {"n1": "is down", "n2": "is slow"}


def test_an_owner_who_cannot_be_heard_has_not_asked(tmp_path):
    assert not history.asked_to_end(tmp_path, "7")
    (tmp_path / history.FOLDER / history.CANCELLED).mkdir(parents=True)  # reading it fails, as over a network
    assert not history.asked_to_end(tmp_path, "7")
