"""``sluice eval --watch RUN SUITE``: checkpoints of a run that goes on, each evaluated when it is there.

Processes are started for what is new and end with it, so that nothing is held while there is nothing to do. What has
been measured is known by its records: a watch that was killed is simply given again. Whether the run goes on is read
from its folder, wherever it runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from launch import history, status
from launch.evaluate import Wish, arguments_of, start
from launch.history import Attempt
from launch.supervise import STATE, say
from pipeline.config.exitcodes import CONFIG, CRASH, FINISHED, NONFINITE, REQUEUE
from pipeline.core.errors import ConfigError
from pipeline.core.files import stamp
from pipeline.record.state import read_state
from pipeline.suites.on_disk import steps_of

LOOK_SECONDS = 5.0
"""Between two looks into the folder of the checkpoints."""
ASK_SECONDS = 60.0
"""Between two looks at what the run does, where its own word has not changed: SLURM may be asked."""
DEATHS = 3
"""In a row, after which evaluations that die without a word are not started again."""


def watch(wish: Wish) -> int:
    """Evaluate a run's checkpoints, those that are there and those that come, until it has ended. The exit code.

    Raises:
        ConfigError: the suite is not sound, or something else than one run is to be watched.
        LaunchError: there is no such run, or fewer devices than ranks.
    """
    from launch.local import check_alone

    if len(wish.names) != 2 or wish.again or wish.random_init:
        raise ConfigError("--watch takes one run and a suite, and neither --again nor --random-init")
    run = Path(wish.names[0])
    if not (run / "config.toml").is_file():  # else it has begun, though it may have said nothing yet
        status.check_run(run)
    arguments_of(wish)
    check_alone(os.environ)
    return _Watch(run, wish).go_on()


@dataclass
class _Watch:
    """What has been seen of a run."""

    run: Path
    wish: Wish
    seen: set[int] = field(default_factory=set[int])
    """Steps whose evaluation has ended by itself."""
    code: int = FINISHED
    deaths: int = 0
    said: str = ""

    def go_on(self) -> int:
        """Until the run has ended, and all that it has left is evaluated."""
        asked, word, over = -ASK_SECONDS, None, False
        while True:
            ended = over  # looked at before the checkpoints are, so that the last one is not missed
            new = [step for step in steps_of(self.run) if step not in self.seen]
            if new:
                code = self._evaluate(new)
                if code is not None:
                    return code
            elif ended:
                return self.code
            elif stamp(self.run / STATE) != word or time.monotonic() > asked + ASK_SECONDS:
                word, asked = stamp(self.run / STATE), time.monotonic()
                over = self._over()
            if not new and not over:
                time.sleep(LOOK_SECONDS)

    def _evaluate(self, steps: Sequence[int]) -> int | None:
        """Evaluate checkpoints in processes that end. An exit code where there is no going on."""
        say(f"evaluating {_listed(steps)} of {self.run}")
        names = [f"{self.run}@{step}" for step in steps]
        arguments = [*arguments_of(replace(self.wish, names=[*names, self.wish.names[-1]])), "--fleeting"]
        code = start(arguments, self.wish.procs)
        if code in (CONFIG, REQUEUE):
            return code
        if code is None:
            self.deaths += 1
            return CRASH if self.deaths == DEATHS else None
        self.deaths = 0
        self.seen |= set(steps)
        self.code = max(self.code, code)
        return None

    def _over(self) -> bool:
        """Whether the run makes no further checkpoints; what it does is said when that changes."""
        phase, detail = status.phases([self.run])[self.run]
        over = phase == "finished" or (phase not in ("queued", "running") and self._for_good())
        text = f"{self.run} is {phase}{f', {detail}' if detail else ''}"
        if not over and phase not in ("queued", "running", "not started"):
            text += f"; waiting until it goes on (sluice resume {self.run})"
        if text != self.said:
            say(text)
            self.said = text
        return over

    def _for_good(self) -> bool:
        """Whether a run that is not at work would fail again, or its job was left alone."""
        state = read_state(self.run)
        if state is None:
            return False
        if state.outcome == "failed" and state.exit_code in (CONFIG, NONFINITE):
            return True
        last = (history.read(self.run) or [None])[-1]
        return isinstance(last, Attempt) and last.decision == "stop" and state.time <= last.end


def _listed(steps: Sequence[int]) -> str:
    if len(steps) == 1:
        return f"step {steps[0]}"
    return f"{len(steps)} checkpoints, step {steps[0]} to {steps[-1]},"
