"""``sluice eval``: from words to the command of the ranks that evaluate."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from launch.suites import find_suite
from pipeline.config.exitcodes import CONFIG, CRASH, REQUEUE
from pipeline.core.errors import CheckpointError, ConfigError, DataError, LaunchError
from pipeline.core.manifest import load

if TYPE_CHECKING:
    from pipeline.config.schema import SuiteConfig, Weights


@dataclass(frozen=True)
class Wish:
    """What is asked for on the command line."""

    names: Sequence[str]
    """Subjects, and the suite at the end."""
    overrides: Sequence[str] = ()
    include: Sequence[Path] = ()
    weights: Sequence[str] = ()
    random_init: bool = False
    out: Path | None = None
    again: bool = False
    limit: int | None = None
    procs: int = 1


def evaluate(wish: Wish) -> int:
    """Become the process that evaluates, or start several and wait. Returns the exit code.

    Raises:
        ConfigError: the suite is not sound, or a word means nothing.
        LaunchError: fewer devices than ranks.
    """
    from launch.local import become, check_alone

    arguments = arguments_of(wish)
    if wish.procs == 1:
        become(arguments)
    check_alone(os.environ)
    code = start(arguments, wish.procs)
    return CRASH if code is None else code


def start(arguments: Sequence[str], procs: int, what: str = "the evaluation") -> int | None:
    """Run ranks that evaluate, or do what else goes on when it is given again, until all have ended.

    Returns their exit code; REQUEUE: a signal has ended them; None: they died without a word, which is said.

    None is left behind: should this process be killed, so are they (:func:`launch.supervise.run_session`). What
    has been measured is kept, and there is nothing else to save.

    Args:
        arguments: of :mod:`pipeline.run`.
        procs: ranks.
        what: it is called.

    Raises:
        LaunchError: fewer devices than ranks.
    """
    from launch.local import child_environment, deepspeed_command, run_command
    from launch.supervise import STOP, run_session, say

    environment = child_environment(procs)
    with TemporaryDirectory(prefix="sluice-eval-") as place:
        notes, outcome = Path(place), Path(place, "outcome")
        told = [*arguments, "--outcome", str(outcome)]
        command = run_command(told) if procs == 1 else deepspeed_command("pipeline.run", told, procs, environment)

        def asked() -> str | None:
            return f"{what} is left; given again, it goes on" if (notes / STOP).exists() else None

        sys.stdout.flush()
        status = run_session(command, notes, environment, asked)
        if (notes / STOP).exists():
            return REQUEUE
        if outcome.exists():
            return int(outcome.read_text())
    if status == CONFIG:
        return CONFIG
    say(f"{what} died (status {status}); given again, it goes on")
    return None


def arguments_of(wish: Wish) -> list[str]:
    """Of :mod:`pipeline.run`, after as much of them was checked as needs no framework."""
    from pipeline.config.load import load_suite

    if len(wish.names) < 2:
        raise ConfigError("say what is evaluated and by which suite: sluice eval RUN SUITE (--list shows the suites)")
    *subjects, named = wish.names
    suite = find_suite(named, wish.include)
    if suite.is_fifo():
        raise ConfigError(f"{suite} is a pipe, and the ranks have to read it again: write it into a file first")
    if not suite.is_file() and Path(named).suffix != ".toml":
        raise LaunchError(f"{named} is no suite")
    load_suite(suite, wish.overrides)
    arguments = ["eval"]
    for subject in subjects:
        arguments += ["--run", f"random:{subject}" if wish.random_init else subject]
    arguments += ["--suite", str(suite)]
    for word in wish.overrides:
        arguments += ["--set", word]
    for kind in wish.weights:
        arguments += ["--weights", str(checked_weights(kind))]
    if wish.out is not None:
        arguments += ["--out", str(wish.out)]
    if wish.limit is not None:
        arguments += ["--limit", str(wish.limit)]
    return [*arguments, *["--again"] * wish.again]


def checked_weights(word: str) -> Weights:
    """Which weights of a checkpoint.

    Raises:
        ConfigError: there are none of that name.
    """
    if word in ("model", "ema"):
        return word
    try:
        if 0 < (width := float(word)) < 0.28:
            return width
    except ValueError:
        pass
    raise ConfigError(f"--weights {word}: write model, ema, or the relative width of an average, below 0.28")


def validate(name: str, include: Sequence[Path], overrides: Sequence[str]) -> str:
    """Say that a suite is sound, down to its data sets.

    Raises:
        ConfigError: with every mistake.
    """
    from pipeline.config.load import load_suite
    from pipeline.config.mistakes import Mistakes
    from pipeline.core.components import check_suite

    path = find_suite(name, include)
    suite = load_suite(path, overrides)
    problems = [*_judge_problems(suite), *_data_problems(suite)]
    try:
        check_suite(suite, str(path))
    except Mistakes as mistakes:
        problems += mistakes.problems
    if problems:
        raise Mistakes(str(path), problems)
    return f"{path} is sound"


def _judge_problems(suite: SuiteConfig) -> Iterator[str]:
    """A model that judges and is not there."""
    from pipeline.suites.subjects import find

    if suite.judge is not None:
        try:
            find([suite.judge])
        except (ConfigError, CheckpointError) as error:
            yield f"judge: {error}"


def _data_problems(suite: SuiteConfig) -> Iterator[str]:
    """Data sets that are not there or damaged."""
    from pipeline.suites.indexed import shards_there

    sets = {"streams": suite.streams} | {f"data.{name}": streams for name, streams in suite.data.items()}
    for where, streams in sets.items():
        for name, data in streams.items():
            try:
                folder = shards_there(data)
                if folder is not None:
                    load(folder)
            except (ConfigError, DataError) as error:
                yield f"{where}.{name}: {error}"
