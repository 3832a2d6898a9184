"""``sluice sweep``: many runs of one configuration, one after the other here, each exactly once.

What is done is read from the runs' own folders, so a sweep that was killed is simply given again: finished runs are
passed over, others go on from their newest checkpoint, and those that failed for good stay so until they are asked
for again. A run is claimed by a lock of its folder's ``launch/`` while this works at it, and by its own lock while it
trains; one that somebody else works at is waited for.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from launch import history, local, status
from launch.supervise import STOP, STOP_SIGNALS, run_session, say
from launch.variants import (
    Ended,
    failures,
    folder_of,
    outcome_table,
    read_ended,
    reason,
    same_run,
    standing,
    write_ended,
)
from pipeline.config import load, provenance
from pipeline.config.exitcodes import CRASH, FINISHED, REQUEUE
from pipeline.config.mistakes import Mistakes
from pipeline.config.sweep import Plan, Variant, load_sweep, told
from pipeline.core.errors import ConfigError, LaunchError
from pipeline.core.files import replace_file, stamp

CONFIG_FILE = "sweep.toml"
"""In a run's ``launch/``: what it was started with."""
LOCK = "sweep.lock"
WAIT_SECONDS = 2.0


class Asked(NamedTuple):
    """What is asked for on the command line."""

    config: Path
    overrides: Sequence[str] = ()
    procs: int = 1
    retry: bool = False
    """Start runs again that have failed for good."""


def examined(asked: Asked) -> Plan:
    """All runs of a sweep, sound and at one with what is in their folders already.

    Raises:
        Mistakes: with those of all runs.
        ConfigError: the suite is not sound.
    """
    title = str(asked.config)
    plan = load_sweep(asked.config, asked.overrides)
    problems: dict[str, list[str]] = {}
    for variant in plan.variants:
        try:
            same_run(variant, title)
        except ConfigError as error:
            problems.setdefault(str(error), []).append(variant.name)
    if plan.suite is not None:
        try:
            load.load_suite(plan.suite)
        except ConfigError as error:
            problems[f"sweep.suite: {error}"] = []
    if problems:
        raise Mistakes(title, told(problems, len(plan.variants)))
    return plan


def dry(asked: Asked, plan: Plan) -> str:
    """What would be done, run by run."""
    said = {"new": "would be trained", "begun": "would go on", "finished": "has finished", "failed": "has failed"}
    lines: list[str] = []
    for variant in plan.variants:
        state = standing(variant)
        words = said["begun" if state == "failed" and asked.retry else state]
        lines.append(f"{variant.name:<{max(len(v.name) for v in plan.variants)}}  {words}")
    suite = f", each evaluated by {plan.suite}" if plan.suite else ""
    return "\n".join(
        [*lines, f"{len(plan.variants)} runs in {plan.folder}{suite}", f"left: sluice check {asked.config}"]
    )


def check_all(asked: Asked) -> None:
    """Check what needs torch, of all runs, in a process that ends.

    Raises:
        ConfigError: with all mistakes of all runs.
    """
    words = [word for override in asked.overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "launch", "check", str(asked.config), *words, "--procs", str(asked.procs)]
    environment = local.child_environment(1)
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError((done.stderr or done.stdout).strip().removeprefix("sluice: "))


class Sweep:
    """One go through a sweep on this machine."""

    def __init__(self, asked: Asked, plan: Plan) -> None:
        self.asked, self.plan = asked, plan
        self.signals: list[int] = []
        self.suite = ""
        if plan.suite is not None:
            self.suite = hashlib.sha256(load.dump(load.load_suite(plan.suite)).encode()).hexdigest()[:16]

    def run(self) -> int:
        """Do what is to be done, show what has become of all, and give the exit code."""
        with _signals(self.signals):
            left: Sequence[Variant] = self.plan.variants
            while left and not self.signals:
                busy = [variant for variant in left if not self.signals and not self._done(variant)]
                if busy and len(busy) == len(left):
                    time.sleep(WAIT_SECONDS)
                elif busy:
                    say(f"waiting for what others are at: {', '.join(variant.name for variant in busy)}")
                left = busy
        print(outcome_table(self.plan), flush=True)
        if self.signals:
            return REQUEUE
        return CRASH if failures(self.plan) else FINISHED

    def _done(self, variant: Variant) -> bool:
        """Train and evaluate a run, as far as that is not done; False: somebody else is at it."""
        folder = folder_of(variant)
        with claimed(folder) as own:
            if not own:
                return False
            state = standing(variant)
            if state in ("new", "begun") or (state == "failed" and self.asked.retry):
                code = self._train(variant)
                if code is None:
                    return False
                if code == REQUEUE or _asked_since(folder):
                    self.signals.append(signal.SIGTERM)
            if standing(variant) == "finished" and self.plan.suite is not None and not self.signals:
                self._evaluate(variant)
        return True

    def _train(self, variant: Variant) -> int | None:
        """Its exit code; None: somebody else is at it."""
        folder = folder_of(variant)
        notes = folder / history.FOLDER
        number = [v.name for v in self.plan.variants].index(variant.name) + 1
        say(f"run {number} of {len(self.plan.variants)}: {variant.name}")
        (folder / STOP).unlink(missing_ok=True)
        replace_file(notes / CONFIG_FILE, load.dump(variant.config).encode())
        words = ["sluice", "train", str(notes / CONFIG_FILE), "--procs", str(self.asked.procs)]
        os.environ |= provenance.command_variable(words)
        before = stamp(folder / "state.json")
        try:
            code, error = local.train(variant.config, notes / CONFIG_FILE, [], self.asked.procs), ""
        except LaunchError as refusal:
            code, error = refusal.exit_code, str(refusal)
        if code not in (FINISHED, REQUEUE):
            fresh = stamp(folder / "state.json") != before
            if not fresh and status.phases([folder])[folder][0] in ("running", "queued"):
                return None
            error = error or reason(folder, code)
            say(f"{variant.name} has failed: {error}")
        write_ended(folder, Ended(provenance.digest(variant.config), code, error))
        return code

    def _evaluate(self, variant: Variant) -> None:
        """Evaluate a finished run as `sluice eval` does, unless this suite has been."""
        folder = folder_of(variant)
        ended = read_ended(folder) or Ended(provenance.digest(variant.config), FINISHED)
        if ended.suite == self.suite and (ended.suite_code == FINISHED or not self.asked.retry):
            return
        notes = folder / history.FOLDER
        (notes / STOP).unlink(missing_ok=True)
        say(f"evaluating {variant.name}")
        log = notes / f"eval-{Path(str(self.plan.suite)).stem}.log"
        command = eval_command(folder, str(self.plan.suite))
        # A shell, so that what it says goes to a file; nothing of it is read by the shell.
        logged = ["sh", "-c", 'log=$1; shift; exec "$@" >"$log" 2>&1', "sh", str(log), *command]

        def stopped() -> str | None:
            return "the evaluation is left; the sweep, given again, does it" if (notes / STOP).exists() else None

        code = run_session(logged, notes, local.child_environment(1), stopped)
        if (notes / STOP).exists():
            (notes / STOP).unlink()
            self.signals.append(signal.SIGTERM)
            return
        error = "" if code == FINISHED else f"{_last_words(log)} (all of it: {log})"
        if error:
            say(f"{variant.name}: the evaluation has failed: {error}")
        write_ended(folder, replace(ended, suite=self.suite, suite_code=code, suite_error=error))


def eval_command(folder: Path, suite: str) -> list[str]:
    """What evaluates a run, as a person would."""
    return [sys.executable, "-m", "launch", "eval", str(folder), suite]


def _asked_since(folder: Path) -> bool:
    """Whether it was asked to stop, and reached its end before it could."""
    return (folder / STOP).exists()


def _last_words(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    own = [line.removeprefix("sluice: ") for line in lines if line.startswith("sluice: ")]
    return (own or lines or ["it was killed without a word"])[-1]


@contextmanager
def claimed(folder: Path) -> Generator[bool]:
    """Have a run to oneself among sweeps, until this process ends; False: another one has it.

    Raises:
        LaunchError: its folder cannot be written.
    """
    try:
        (folder / history.FOLDER).mkdir(parents=True, exist_ok=True)
        file = os.open(folder / history.FOLDER / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise LaunchError(f"cannot write {folder}: {error.strerror}; set run.folder") from error
    try:
        own = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            own = False
        except OSError:  # a file system without locks: the run's own lock, which needs none, has to do
            pass
        yield own
    finally:
        os.close(file)


@contextmanager
def _signals(seen: list[int]) -> Generator[None]:
    """Between two runs, signals that ask to stop are kept."""

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    handled = [s for s in STOP_SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
    old = {s: signal.signal(s, note) for s in handled}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def sweep(asked: Asked, *, dry_run: bool) -> int:
    """Do a sweep on this machine; print what it has come to. Returns the exit code.

    Raises:
        ConfigError: with every mistake of every run, before anything is started.
        LaunchError: a run's folder cannot be written.
    """
    plan = examined(asked)
    if dry_run:
        print(dry(asked, plan))
        return FINISHED
    with suppress(KeyError):
        del os.environ[provenance.COMMAND]
    if any(standing(v) in ("new", "begun") or (standing(v) == "failed" and asked.retry) for v in plan.variants):
        check_all(asked)
    return Sweep(asked, plan).run()
