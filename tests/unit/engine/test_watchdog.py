"""When nothing goes on any more: who is behind, and that the process ends whatever its main thread does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.engine.watchdog import FACTOR, PATIENCE, behind, limit
from pipeline.record.beats import Beat, Pulse, read_beats
from pipeline.record.state import State, read_state, write_state

ROOT = Path(__file__).parents[3]


def beats(*places, alive=1.0):
    return [Beat(r, f"node{r}", 100 + r, 0, step, phase, 0.0, None, alive) for r, (phase, step) in enumerate(places)]


def test_limits_are_learned(tmp_path):
    pulse = Pulse(tmp_path, 0, 0)
    assert limit(pulse, 5.0) == PATIENCE * 5.0  # the start
    pulse.at("step", 1)
    assert limit(pulse, 5.0) == PATIENCE * 5.0  # the first steps
    pulse.steps.extend([1.0, 2.0, 3.0])
    assert limit(pulse, 5.0) == FACTOR * 2.0
    assert limit(pulse, 50.0) == 50.0
    pulse.at("checkpoint")
    assert limit(pulse, 5.0) == PATIENCE * 5.0
    pulse.longest["checkpoint"] = 40.0
    assert limit(pulse, 5.0) == FACTOR * 40.0
    pulse.at("data")
    assert limit(pulse, 5.0) == FACTOR * 2.0


def test_phases_are_timed(tmp_path):
    pulse = Pulse(tmp_path, 0, 0)
    pulse.at("step", 1)
    pulse.at("checkpoint", 1)
    time.sleep(0.05)
    pulse.at("step", 2)
    assert pulse.longest["checkpoint"] >= 0.05
    assert list(pulse.steps) == [pytest.approx(pulse.longest["checkpoint"], abs=0.5)]
    longest = pulse.longest["checkpoint"]
    pulse.at("checkpoint", 2)
    pulse.at("step", 3)
    assert pulse.longest["checkpoint"] == longest, "a short one changes nothing"


def test_a_rank_that_does_not_run_is_named():
    before = beats(("step", 7), ("step", 7), ("step", 7))
    after = [replace(b, alive=2.0) if b.rank != 1 else b for b in before]
    assert behind(before, after).startswith("rank 1 (process 101 on node1) does not answer")


def test_the_rank_that_is_least_far_is_named():
    found = behind(
        beats(("step", 7), ("data", 7), ("step", 7)), beats(("step", 7), ("data", 7), ("step", 7), alive=2.0)
    )
    assert found == 'rank 1 (process 101 on node1) is still in "data" of step 7'
    found = behind(beats(("data", 8), ("checkpoint", 7)), beats(("data", 8), ("checkpoint", 7), alive=2.0))
    assert found == 'rank 1 (process 101 on node1) is still in "checkpoint" of step 7'


def test_what_follows_a_step_comes_after_it():
    places = [("step", 7), ("checkpoint", 7), ("log", 7)]
    assert (
        behind(beats(*places), beats(*places, alive=2.0))
        == 'rank 0 (process 100 on node0) is still in "step" of step 7'
    )


def test_when_all_are_alike_it_says_so():
    assert "all ranks" in behind(beats(("step", 7), ("step", 7)), beats(("step", 7), ("step", 7), alive=2.0))


HANGS = """
import ctypes, sys, time; from pathlib import Path
from pipeline.engine.watchdog import Watchdog; from pipeline.record.beats import Pulse
pulse = Pulse(Path(sys.argv[1]), 0, 2)
Watchdog(Path(sys.argv[1]), pulse, 0.3, None).start()
for step in range(1, 30):
    pulse.at("step", step); time.sleep(0.02)
def waits_for_ever(): time.sleep(60)
def keeps_the_interpreter():
    for _ in range(2): ctypes.PyDLL(None).sleep(60)  # the call for its stack interrupts the first
{name}()
"""


def hang(folder, name):
    write_state(folder, State("running", None, 20, 2))
    command = [sys.executable, "-c", HANGS.format(name=name), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)


def test_a_main_thread_that_waits_is_ended_with_its_stack_and_a_reason(tmp_path):
    done = hang(tmp_path, "waits_for_ever")
    assert done.returncode == 1, done.stderr
    stacks = (tmp_path / "stacks" / "rank-00000.txt").read_text()
    assert "attempt 2" in stacks and "in waits_for_ever" in stacks
    state = read_state(tmp_path)
    assert state is not None and (state.outcome, state.exit_code, state.rank, state.fault) == ("failed", 1, 0, 29)
    assert state.error is not None and "no step for" in state.error and state.error in done.stderr


def test_a_main_thread_that_keeps_the_interpreter_is_ended_all_the_same(tmp_path):
    done = hang(tmp_path, "keeps_the_interpreter")
    assert done.returncode in (1, -signal.SIGKILL), "by itself, if the call has woken it, or by its guard"
    assert "Thread 0x" in done.stderr and "in keeps_the_interpreter" in done.stderr


def test_a_job_that_was_suspended_goes_on(tmp_path):
    """All its processes are stopped for longer than a step may last, and than its guard waits: `scontrol suspend`."""
    write_state(tmp_path, State("running", None, 20, 2))
    body = HANGS.replace("0.3", "4.0").replace("time.sleep(60)", "[time.sleep(0.05) for _ in range(60)]")
    command = [sys.executable, "-c", body.format(name="waits_for_ever"), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not any(beat.step == 29 for beat in read_beats(tmp_path)):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(6.5)
    os.killpg(process.pid, signal.SIGCONT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 0, said
