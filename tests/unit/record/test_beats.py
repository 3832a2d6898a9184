"""What a rank says of itself, and what is left of it when it is killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.record.beats import FOLDER, WIDTH, Pulse, read_beats

ROOT = Path(__file__).parents[3]


def test_the_last_thing_said_is_read(tmp_path):
    pulse = Pulse(tmp_path, 3, 1)
    (started,) = read_beats(tmp_path)
    assert (started.rank, started.attempt, started.phase, started.step) == (3, 1, "start", 0)
    assert (started.host, started.pid) == (socket.gethostname(), os.getpid())
    assert started.step_seconds is None and started.alive is None
    pulse.at("data", 8)
    pulse.at("step")
    pulse.at("checkpoint", 8)
    pulse.at("step", 9)
    (beat,) = read_beats(tmp_path)
    assert (beat.phase, beat.step) == ("step", 9)
    assert beat.step_seconds is not None and beat.step_seconds > 0
    assert abs(beat.time - time.time()) < 60


def test_a_sign_of_life_does_not_touch_what_was_said(tmp_path):
    pulse = Pulse(tmp_path, 0, 0)
    pulse.at("step", 4)
    pulse.live()
    (first,) = read_beats(tmp_path)
    assert first.alive is not None and (first.phase, first.step) == ("step", 4)
    pulse.at("data", 5)
    (second,) = read_beats(tmp_path)
    assert (second.alive, second.phase, second.step) == (first.alive, "data", 5)


def test_only_the_newest_attempt_counts(tmp_path):
    for rank in range(4):
        Pulse(tmp_path, rank, 0).at("step", 7)
    for rank in (0, 1):
        Pulse(tmp_path, rank, 1).at("step", 5)
    assert [(b.rank, b.step) for b in read_beats(tmp_path)] == [(0, 5), (1, 5)]


def test_a_killed_rank_leaves_its_last_step(tmp_path):
    body = (
        "import sys, itertools; from pathlib import Path; from pipeline.record.beats import Pulse\n"
        "assert 'torch' not in sys.modules\n"
        "p = Pulse(Path(sys.argv[1]), 0, 0); print('up', flush=True)\n"
        "for n in itertools.count(1): p.at('step', n)"
    )
    command = [sys.executable, "-c", body, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    seen = []
    # A reader never meets a torn line; on a busy machine it may read often before the first step.
    while len(seen) < 200 or seen[-1] < 2:
        seen += [b.step for b in read_beats(tmp_path)]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert seen == sorted(seen)
    (beat,) = read_beats(tmp_path)
    assert beat.phase == "step" and beat.step >= seen[-1]


@settings(deadline=None)
@given(st.integers(0, 2 * WIDTH))
def test_a_file_of_any_length_is_no_error(tmp_path_factory, size):
    folder = tmp_path_factory.mktemp("run")
    Pulse(folder, 0, 0)
    os.truncate(folder / FOLDER / "00000", size)
    assert len(read_beats(folder)) == 1 if size == 2 * WIDTH else len(read_beats(folder)) <= 1


def test_no_folder_has_no_beats(tmp_path):
    assert read_beats(tmp_path) == []


def test_a_beat_that_cannot_be_read_does_not_hide_the_others(tmp_path):
    Pulse(tmp_path, 0, 0)
    (tmp_path / FOLDER / "00001").mkdir()
    Pulse(tmp_path, 2, 0)
    assert [beat.rank for beat in read_beats(tmp_path)] == [0, 2]


def test_what_is_not_told_stays_as_it_was(tmp_path):
    pulse = Pulse(tmp_path, 0, 0)
    pulse.at("step", 7)
    pulse.at("log")
    assert [(b.phase, b.step) for b in read_beats(tmp_path)] == [("log", 7)]
    pulse.steps.extend([3.0, 4.0])
    pulse.at("checkpoint")
    assert read_beats(tmp_path)[0].step_seconds == 4.0, "the last one's"


def test_a_sign_of_life_is_sent_to_where_other_machines_read_it(tmp_path, monkeypatch):
    """Over NFS, what is only written stays with the machine that has written it."""
    pulse, seen = Pulse(tmp_path, 0, 0), []
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.extend(read_beats(tmp_path)))
    pulse.live()
    assert [beat.alive is not None for beat in seen] == [True]


def test_a_sign_of_life_of_an_earlier_attempt_is_not_this_one_s(tmp_path):
    Pulse(tmp_path, 0, 0).live()
    Pulse(tmp_path, 0, 1)
    assert [(beat.attempt, beat.alive) for beat in read_beats(tmp_path)] == [(1, None)]


def test_a_line_that_is_read_while_it_is_written_is_read_again(tmp_path, monkeypatch):
    Pulse(tmp_path, 0, 0)
    read, torn = Path.read_bytes, [b"", b'{"rank": 0']
    monkeypatch.setattr(Path, "read_bytes", lambda path: torn.pop() if torn else read(path))
    assert [beat.rank for beat in read_beats(tmp_path)] == [0]
