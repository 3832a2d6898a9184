"""A watchdog among other ranks and other jobs: whom it follows, what it keeps alive, and when it lets go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.engine.watchdog import PATIENCE, behind, limit
from pipeline.record.beats import Pulse, read_beats
from pipeline.record.state import State, read_state, write_state
from tests.unit.engine.test_watchdog import ROOT, beats

START = """
import json, os, sys, time; from pathlib import Path
from pipeline.engine.watchdog import Watchdog; from pipeline.record.beats import Pulse
from pipeline.record.lock import RunLock
folder = Path(sys.argv[1])
def until(condition):
    while not condition(): time.sleep(0.02)
"""


def program(folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    """A process that has all it needs for a watchdog, and does ``body``."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", START + body, str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)


@pytest.mark.parametrize("steps", [[1.0], [1.0, 1.0]])
def test_one_quick_step_is_not_taken_for_the_rule(tmp_path, steps):
    pulse = Pulse(tmp_path, 0, 0)
    pulse.at("step", 1)
    pulse.steps.extend(steps)
    assert limit(pulse, 60.0) == PATIENCE * 60.0


def test_when_no_rank_seems_to_answer_the_places_decide():
    """As when a file system shows everybody's signs of life late."""
    places = beats(("step", 7), ("data", 7), ("step", 7))
    assert behind(places, places) == 'rank 1 (process 101 on node1) is still in "data" of step 7'


def test_when_nothing_can_be_read_nobody_is_named():
    assert behind(beats(("step", 7)), []) == "no rank's place can be read; see their stacks"


def test_all_that_do_not_answer_are_named():
    before = beats(("step", 7), ("step", 7), ("step", 7))
    after = [b if b.rank else beats(("step", 7), alive=2.0)[0] for b in before]
    assert [part.split(" (")[0] for part in behind(before, after).split("; ")] == ["rank 1", "rank 2"]


def test_a_rank_follows_one_that_has_noticed_and_leaves_the_cause_to_it(tmp_path):
    write_state(tmp_path, State("running", None, 20, 2))
    (tmp_path / "stacks").mkdir()
    done = program(
        tmp_path,
        "dog = Watchdog(folder, Pulse(folder, 3, 2), 60.0, None); dog.tick = 0.05; dog.start()\n"
        "(folder / 'stacks' / 'attempt-2').touch()\n"
        "until(lambda: False)",  # by itself it would wait for six minutes
    )
    assert done.returncode == 1, done.stderr
    assert "attempt 2" in (tmp_path / "stacks" / "rank-00003.txt").read_text()
    state = read_state(tmp_path)
    assert state is not None and state.outcome == "running"


def test_of_two_that_notice_at_once_one_leads(tmp_path):
    """The other one's call comes between looking for it and giving an own one."""
    write_state(tmp_path, State("running", None, 20, 2))
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks" / "attempt-2").touch()
    done = program(
        tmp_path,
        "Path.exists = lambda path: False\n"
        "pulse = Pulse(folder, 3, 2); pulse.at('step', 1); pulse.steps.extend([.1] * 3)\n"
        "dog = Watchdog(folder, pulse, 0.2, None); dog.tick = 0.05; dog.start(); until(lambda: False)",
    )
    assert done.returncode == 1 and "no step for" not in done.stderr, done.stderr
    assert "attempt 2" in (tmp_path / "stacks" / "rank-00003.txt").read_text()
    state = read_state(tmp_path)
    assert state is not None and state.outcome == "running"


def test_who_waits_is_not_taken_for_the_one_that_does_not_answer(tmp_path):
    stopped = Pulse(tmp_path, 1, 2)
    stopped.at("step", 1)
    stopped.live()
    done = program(
        tmp_path,
        "pulse = Pulse(folder, 0, 2); pulse.at('step', 1); pulse.steps.extend([.1] * 3)\n"
        "dog = Watchdog(folder, pulse, 0.2, None); dog.tick = 0.05; dog.start(); until(lambda: False)",
    )
    assert done.returncode == 1 and f"rank 1 (process {os.getpid()} on " in done.stderr, done.stderr
    assert "does not answer: stopped" in done.stderr and "rank 0 (" not in done.stderr


def test_a_hang_of_an_earlier_attempt_is_not_followed(tmp_path):
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks" / "attempt-1").touch()
    done = program(
        tmp_path,
        "pulse = Pulse(folder, 0, 2); dog = Watchdog(folder, pulse, 60.0, None); dog.tick = 0.05; dog.start()\n"
        "until(lambda: b'null' not in (folder / 'beats' / '00000').read_bytes().splitlines()[1])\n"
        "dog.stop(); print('well')",
    )
    assert (done.returncode, done.stdout) == (0, "well\n"), done.stderr


def test_a_long_phase_shows_that_its_rank_lives(tmp_path):
    done = program(
        tmp_path,
        "pulse = Pulse(folder, 0, 0); pulse.at('checkpoint', 4); dog = Watchdog(folder, pulse, 60.0, None)\n"
        "dog.tick = 0.05; dog.start()\n"
        "from pipeline.record.beats import read_beats\n"
        "until(lambda: read_beats(folder)[0].alive is not None); dog.stop()",
    )
    assert done.returncode == 0, done.stderr
    (beat,) = read_beats(tmp_path)
    assert beat.alive is not None and beat.alive > beat.time


def test_the_lock_is_renewed_and_whoever_has_lost_it_ends(tmp_path):
    done = program(
        tmp_path,
        "lock = RunLock(folder); lock.take(); first = (folder / 'lock').read_bytes()\n"
        "dog = Watchdog(folder, Pulse(folder, 0, 0), 60.0, lock); dog.tick = 0.05; dog.start()\n"
        "until(lambda: (folder / 'lock').read_bytes() != first); print('renewed', flush=True)\n"
        "facts = json.loads((folder / 'lock').read_bytes()) | {'token': 'another'}\n"
        "while True: (folder / 'new').write_text(json.dumps(facts)); os.replace(folder / 'new', folder / 'lock')",
    )
    assert (done.returncode, done.stdout) == (1, "renewed\n"), done.stderr
    assert f"another job has taken over {tmp_path}" in done.stderr
    assert json.loads((tmp_path / "lock").read_bytes())["token"] == "another"


def test_nothing_of_it_is_left_after_its_end(tmp_path):
    """The process that watches the watchdog would kill this one much later."""
    done = program(
        tmp_path,
        "def threads(): return len(os.listdir('/proc/self/task')) + sum(\n"
        "    len(Path(f'/proc/self/task/{t}/children').read_text().split()) for t in os.listdir('/proc/self/task'))\n"
        "before = threads(); dog = Watchdog(folder, Pulse(folder, 0, 0), 60.0, None); dog.tick = 0.05; dog.start()\n"
        "until(lambda: threads() == before + 2); dog.stop()\n"
        "for _ in range(200): time.sleep(0.02 * (threads() > before))\n"
        "print(threads() - before)",
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_a_file_system_that_fails_for_a_while_costs_signs_of_life_and_no_more(tmp_path):
    """Writing them fails, and so do reading the lock and looking for another's call; later all go on."""
    done = program(
        tmp_path,
        "lock = RunLock(folder); lock.take(); pulse = Pulse(folder, 0, 0); pulse.at('checkpoint', 4)\n"
        "dog = Watchdog(folder, pulse, 60.0, lock); dog.tick = 0.02\n"
        "writes, looks, fails = os.pwrite, Path.exists, {'write': 0, 'look': 0}\n"
        "def fail(what): fails[what] += 1; raise OSError(116, 'stale')\n"
        "(folder / 'lock').rename(folder / 'kept'); os.pwrite = lambda *args: fail('write'); dog.start()\n"
        "until(lambda: fails['write'] > 5); Path.exists = lambda path: fail('look')\n"
        "until(lambda: fails['look'] > 5); kept = (folder / 'kept').read_bytes()\n"
        "os.pwrite, Path.exists = writes, looks; (folder / 'kept').rename(folder / 'lock')\n"
        "until(lambda: (folder / 'lock').read_bytes() != kept); dog.stop(); print('well')",
    )
    assert (done.returncode, done.stdout) == (0, "well\n"), done.stderr
