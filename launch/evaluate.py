"""``sluice eval``: from words to the command of the ranks that evaluate."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from launch.suites import find_suite
from pipeline.core.errors import ConfigError, DataError, LaunchError
from pipeline.core.manifest import load

if TYPE_CHECKING:
    from pipeline.config.schema import SuiteConfig


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


def evaluate(wish: Wish) -> NoReturn:
    """Become the process that evaluates, or DeepSpeed's launcher of several.

    Raises:
        ConfigError: the suite is not sound, or a word means nothing.
        LaunchError: fewer devices than ranks.
    """
    from launch.local import check_alone, child_environment, deepspeed_command, run_command

    arguments = arguments_of(wish)
    check_alone(os.environ)
    environment = child_environment(wish.procs)
    sys.stdout.flush()
    if wish.procs == 1:
        command = run_command(arguments)
    else:
        command = deepspeed_command("pipeline.run", arguments, wish.procs, environment)
    os.execve(command[0], command, environment)


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
        arguments += ["--weights", _checked(kind)]
    if wish.out is not None:
        arguments += ["--out", str(wish.out)]
    if wish.limit is not None:
        arguments += ["--limit", str(wish.limit)]
    return [*arguments, *["--again"] * wish.again]


def _checked(weights: str) -> str:
    """Which weights of a checkpoint.

    Raises:
        ConfigError: there are none of that name.
    """
    try:
        if weights in ("model", "ema") or 0 < float(weights) < 0.28:
            return weights
    except ValueError:
        pass
    raise ConfigError(f"--weights {weights}: write model, ema, or the relative width of an average, below 0.28")


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
    problems = list(_data_problems(suite))
    try:
        check_suite(suite, str(path))
    except Mistakes as mistakes:
        problems += mistakes.problems
    if problems:
        raise Mistakes(str(path), problems)
    return f"{path} is sound"


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
