"""A thread in each rank that notices when nothing goes on any more.

How long is too long is learned from the run: ten times the median step, and never less than a floor; the start, the
first steps and what is done between steps have six times the floor, or ten times their longest so far. When a rank has
waited longer, the stacks of all threads of all ranks are written to ``stacks/rank-R.txt``, the rank that holds up the
others is named from the beats, and the processes end, so that the run is started again from its newest checkpoint.

The thread runs while the main one waits in a collective. A rank whose main thread holds the interpreter cannot run it:
for that case a small process waits as well, has the rank write its stacks to stderr, and kills it.

A job that was suspended (``scontrol suspend``) has not hung: the thread sees that it has not run itself, and the small
process counts its own turns and not seconds, so that the time in which nothing ran counts for neither.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import NoReturn

from pipeline.config.exitcodes import CRASH
from pipeline.record.beats import Beat, Pulse, read_beats
from pipeline.record.lock import RENEWED, RunLock
from pipeline.record.logs import ECHO_SECONDS
from pipeline.record.state import close_state

FOLDER = "stacks"
FACTOR = 10
"""A step is too long when it takes so many times the median."""
PATIENCE = 6
"""What is not a step has so many times the floor."""
SUSPENDED = 10
"""Ticks without a turn after which the thread takes the whole process to have been stopped."""
KNOWN_STEPS = 3
"""Steps after which their median is believed."""


_GUARD = """
import os, select, signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)  # what asks a rank to stop is not for this
tick, rank, turns, allowed = float(sys.argv[1]), int(sys.argv[2]), 0, 0
while True:
    if select.select([0], [], [], tick)[0]:
        told = os.read(0, 4096)
        if not told:
            sys.exit()
        turns, allowed = 0, int(told.split()[-1])
    elif os.getppid() != rank:
        sys.exit()
    elif allowed:
        turns += 1
        if turns > allowed:
            os.kill(rank, signal.SIGUSR2)
            time.sleep(5 * tick)
            os.kill(rank, signal.SIGKILL)
            sys.exit()
"""
"""Reads from a pipe how many turns, of a tick each, the rank may be silent; then has it write its stacks, and kills it.
When the rank is gone the pipe ends, and so does this."""


class _Guard:
    """The small process that watches the watchdog; see :data:`_GUARD`."""

    def __init__(self, tick: float) -> None:
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
        command = [sys.executable, "-I", "-S", "-c", _GUARD, str(tick), str(os.getpid())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)

    def allow(self, turns: int) -> None:
        """The next word of the rank comes before the guard has had so many turns."""
        assert self._process.stdin is not None
        with suppress(OSError):  # somebody has killed it
            os.write(self._process.stdin.fileno(), b"%d\n" % turns)

    def close(self) -> None:
        """End it."""
        self._process.communicate()
        faulthandler.unregister(signal.SIGUSR2)


def limit(pulse: Pulse, floor: float) -> float:
    """Seconds that the present phase may last."""
    phase = pulse.last.phase
    if phase in ("data", "step"):
        steps = list(pulse.steps)  # at once: the main thread goes on appending
        if len(steps) < KNOWN_STEPS:
            return PATIENCE * floor
        return max(floor, FACTOR * statistics.median(steps))
    return max(PATIENCE * floor, FACTOR * pulse.longest.get(phase, 0.0))


def behind(before: list[Beat], after: list[Beat]) -> str:
    """Which rank holds up the others.

    Args:
        before: beats of all ranks when one has waited too long.
        after: a few signs of life later.
    """
    if not after:
        return "no rank's place can be read; see their stacks"
    earlier = {beat.rank: beat for beat in before}
    silent = [b for b in after if b.rank in earlier and b.alive == earlier[b.rank].alive]
    if silent and len(silent) < len(after):
        return "; ".join(f"{_who(b)} does not answer: stopped, or its machine is, in {_where(b)}" for b in silent)
    first = min(after, key=_progress)
    last = [b for b in after if _progress(b) == _progress(first)]
    if len(last) == len(after):
        return f"all ranks are in {_where(first)}; see their stacks"
    return "; ".join(f"{_who(b)} is still in {_where(b)}" for b in last)


def _progress(beat: Beat) -> tuple[int, int]:
    """Waiting for data comes before the step; what follows a step has its number, and comes after."""
    return beat.step, {"data": 0, "step": 1}.get(beat.phase, 2)


def _who(beat: Beat) -> str:
    return f"rank {beat.rank} (process {beat.pid} on {beat.host})"


def _where(beat: Beat) -> str:
    return f'"{beat.phase}" of step {beat.step}'


class Watchdog:
    """Watches this rank's pulse; on rank 0 it also keeps the run folder's lock.

    Args:
        folder: the run's.
        pulse: what the rank says of itself.
        floor: seconds that any step may take.
        lock: of the run folder; None: another rank keeps it.
    """

    def __init__(self, folder: Path, pulse: Pulse, floor: float, lock: RunLock | None) -> None:
        self.folder, self.pulse, self.floor, self.lock = folder, pulse, floor, lock
        self.tick = min(RENEWED, max(0.2, floor / 20))
        self.marker = folder / FOLDER / f"attempt-{pulse.last.attempt}"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End watching."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        with closing(_Guard(self.tick)) as guard:
            self._turns(guard)

    def _turns(self, guard: _Guard) -> None:
        turn = time.monotonic()
        while not self._over.wait(self.tick):
            now = time.monotonic()
            if now - turn > SUSPENDED * self.tick:
                self.pulse.began = min(now, self.pulse.began + now - turn)
            turn = now
            allowed = limit(self.pulse, self.floor)
            waited = time.monotonic() - self.pulse.began
            noticed = False
            # A sign of life that cannot be written, as over a network, is one that is missed, and so is another's call.
            # Were it to end this thread, the guard below would end the process.
            with suppress(OSError):
                noticed = self.marker.exists()
                if waited > 2 * self.tick:
                    self.pulse.live()
                if self.lock is not None:
                    self._keep(self.lock)
            guard.allow(int(allowed / self.tick) + 10)  # with each turn of this thread: it acts if there are none
            if noticed:
                self._follow()
            elif waited > allowed:
                self._lead(waited, allowed)

    def _keep(self, lock: RunLock) -> None:
        if lock.lost():
            self._say(f"another job has taken over {self.folder} while this one did not answer; this one ends")
            self._end()
        lock.renew()

    def _lead(self, waited: float, allowed: float) -> None:
        """The first to notice asks all for their stacks, and says what is wrong."""
        self.marker.parent.mkdir(exist_ok=True)
        try:
            os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return self._follow()
        self._dump()
        before = read_beats(self.folder)
        self._wait(5 * self.tick)
        last = self.pulse.last
        culprit = behind(before, read_beats(self.folder))
        text = (
            f"no step for {waited:.0f} s, where {allowed:.0f} s are allowed: {culprit}. "
            f"The stacks of all ranks that answer are in {self.folder / FOLDER}"
        )
        self._say(text)
        close_state(self.folder, "failed", CRASH, error=text, rank=last.rank, fault=last.step)
        self._end()

    def _follow(self) -> None:
        """Another has noticed: write this rank's stacks, give the other time to say what is wrong, and end."""
        self._dump()
        self._wait(10 * self.tick)
        self._end()

    def _wait(self, seconds: float) -> None:
        """Wait, and let the others see meanwhile that this process runs."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.pulse.live()
            time.sleep(self.tick)

    def _dump(self) -> None:
        last = self.pulse.last
        with open(self.folder / FOLDER / f"rank-{last.rank:05d}.txt", "a", encoding="utf-8") as file:
            file.write(f"== attempt {last.attempt}, {_who(last)}, in {_where(last)}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _end(self) -> NoReturn:
        time.sleep(2 * ECHO_SECONDS)  # what was said last reaches the console
        os._exit(CRASH)

    def _say(self, text: str) -> None:
        print(f"sluice: rank {self.pulse.last.rank}: {text}", file=sys.stderr, flush=True)
