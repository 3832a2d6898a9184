"""Many runs side by side, from small files of their folders: settings, how far they are, what was measured, notes.

Nothing is opened that was not asked for: a list of a thousand runs opens a few files of each, and a configuration is
read only where a condition, an order or a column names one of its settings.
"""

from __future__ import annotations

import math
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.config import provenance
from pipeline.config.changes import ABSENT, flat_toml
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.registry import suggest
from pipeline.core.where import Where
from pipeline.record.metrics import read_last
from pipeline.record.notes import read_remarks
from pipeline.record.results import Row, read_results
from pipeline.record.state import read_state

OWN = ("run", "state", "step", "total_steps", "tags", "note", "error")
"""What is known of a run beside its settings, its last line of metrics and its results."""
SEED = "run.seed"
FOLDER = "run.folder"
_VALIDATION = ("val", "valid", "validation")
_LOWER = re.compile(r"(^|/)(loss|.*_loss|frechet|perplexity|ece|nll|step_seconds|data_wait|memory_gb)$")
_DOTTED = re.compile(
    r"(\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|`[^`]*`)|(?<![\w.])([A-Za-z_][\w-]*(?:[./@][A-Za-z0-9_][\w-]*)+)"
)
"""Quoted texts, and names of several parts: "optimizer.lr", "knn/top1"."""


@dataclass(frozen=True)
class Listed:
    """A run, or several that only their seeds tell apart."""

    folder: Path
    facts: Mapping[str, Any]
    """:data:`OWN`."""
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """By their whole names, "optimizer.lr"; none where they were not asked for."""
    measured: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The last line of the metrics ("loss") and what evaluations found last ("knn/top1")."""
    better: Mapping[str, str] = field(default_factory=dict[str, str])
    """Which results are better "higher" or "lower"."""
    errors: Mapping[str, float] = field(default_factory=dict[str, float])
    """Standard errors: of seeds where several are gathered, else of the evaluation."""
    runs: int = 1

    @cached_property
    def values(self) -> dict[str, Any]:
        """Everything by its name."""
        return {**self.settings, **self.measured, **self.facts}


def read_run(folder: Path, *, settings: bool) -> Listed:
    """What a run's files say of it; of one that cannot be read, why.

    Args:
        folder: of the run.
        settings: read its configuration too.
    """
    try:
        return _read_run(folder, settings)
    except (DataError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        facts: dict[str, Any] = dict.fromkeys(OWN, None) | {"tags": [], "note": ""}
        return Listed(folder, facts | {"run": str(folder), "state": "unreadable", "step": 0, "error": str(error)})


def _read_run(folder: Path, settings: bool) -> Listed:
    state, remarks = read_state(folder), read_remarks(folder)
    found = read_results(folder)
    results, errors, better = _measured(found.rows)
    last = read_last(folder)
    facts = {
        "run": str(folder),
        "state": state.outcome if state else "",
        "step": max(last.get("step", 0), state.step if state else 0),
        "total_steps": provenance.read(folder).get("plan", {}).get("total_steps"),
        "error": "; ".join([*([state.error] if state and state.error else []), *found.damaged]),
        "tags": list(remarks.tags),
        "note": remarks.note,
    }
    own = read_config(folder) if settings else {}
    return Listed(
        folder, facts, own, {name: value for name, value in last.items() if name != "step"} | results, better, errors
    )


def _measured(rows: Sequence[Row]) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    """Of each metric what was measured at the latest step: values, standard errors and which way is better.

    Of several splits, that for validation has the metric's name alone, the others "knn/top1@test".
    """
    latest: dict[str, Row] = {}
    first: dict[str, str] = {}
    for row in rows:
        first[row.metric] = min(first.get(row.metric, row.split), row.split, key=lambda s: (s not in _VALIDATION, s))
    for row in rows:
        if row.step is None:
            continue
        name = row.metric if row.split == first[row.metric] else f"{row.metric}@{row.split}"
        if name not in latest or row.step >= (latest[name].step or 0):
            latest[name] = row
    return (
        {name: row.value for name, row in latest.items()},
        {name: row.stderr for name, row in latest.items() if row.stderr is not None},
        {name: row.better for name, row in latest.items() if row.better is not None},
    )


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """A run's settings by their whole names, "optimizer.lr"; none where it has not got so far.

    Raises:
        DataError: the file is damaged.
    """
    path = Path(folder) / provenance.CONFIG_FILE
    try:
        return flat_toml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); mend it") from error


def config_differences(folders: Sequence[str | os.PathLike[str]]) -> dict[str, tuple[Any, ...]]:
    """The settings in which runs differ, by name; their folders are no difference.

    Args:
        folders: of the runs.

    Returns:
        Of each such setting its values, in the order of ``folders``; :data:`pipeline.config.changes.ABSENT` where a
        run has not got it.

    Raises:
        DataError: a configuration is damaged.
    """
    return differing([read_config(folder) for folder in folders])


def differing(configs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """The same of settings that were read: see :func:`config_differences`."""
    names = sorted({name for config in configs for name in config} - {FOLDER})
    values = {name: tuple(config.get(name, ABSENT) for config in configs) for name in names}
    # As texts too: 1 is not 1.0, nor is it true.
    return {name: found for name, found in values.items() if len({(type(v), repr(v)) for v in found}) > 1}


def condition(text: str) -> Where:
    """A condition on runs; names of several parts ("optimizer.lr", "knn/top1") need no quotes.

    Raises:
        ConfigError: it cannot be read.
    """
    return Where(_DOTTED.sub(lambda match: match[1] or f"`{match[2]}`", text), "--where")


def check_names(names: Iterable[str], runs: Sequence[Listed]) -> None:
    """Be sure that some run has what is asked for.

    Raises:
        ConfigError: none has; the message names what is near.
    """
    known = {*OWN, *(name for run in runs for name in run.values)}
    for name in names:
        if runs and name not in known:
            near = suggest(name, sorted(known))
            raise ConfigError(f"no run has {name!r}; {near if near.startswith('did') else 'see `sluice runs --html`'}")


def chosen(runs: Sequence[Listed], where: Where) -> list[Listed]:
    """Those for which a condition holds.

    Raises:
        ConfigError: no run has what it names, or it compares what cannot be compared.
    """
    check_names(where.columns, runs)
    kept: list[Listed] = []
    for run in runs:
        holds = where.keeps(run.values)
        if isinstance(holds, str):
            raise ConfigError(f"{run.folder}: {holds}")
        if holds:
            kept.append(run)
    return kept


def ordered(runs: Sequence[Listed], key: str) -> list[Listed]:
    """The best first where one can tell, else from the smallest; "-KEY" the other way; without a value last.

    Raises:
        ConfigError: no run has it.
    """
    name = key.removeprefix("-")
    check_names([name], runs)
    falling = (direction(name, runs) == "higher") != key.startswith("-")

    def place(run: Listed) -> tuple[float, str]:
        value = run.values[name]
        number = isinstance(value, int | float)
        return (-value if falling else value) if number else 0.0, "" if number else str(value)

    there = [run for run in runs if _there(run.values.get(name))]
    texts = sorted((run for run in there if place(run)[1]), key=lambda run: place(run)[1], reverse=key[:1] == "-")
    numbers = sorted((run for run in there if not place(run)[1]), key=lambda run: place(run)[0])
    return [*numbers, *texts, *(run for run in runs if not _there(run.values.get(name)))]


def _there(value: Any) -> bool:
    return value is not None and value != "" and not (isinstance(value, float) and math.isnan(value))


def direction(name: str, runs: Sequence[Listed]) -> str | None:
    """Which way a value is better, "higher" or "lower"; None: neither."""
    told = next((run.better[name] for run in runs if name in run.better), None)
    return told or ("lower" if _LOWER.search(name) else None)


def gather_seeds(runs: Sequence[Listed]) -> list[Listed]:
    """Runs that only their seeds tell apart as one: the mean of each number over those that have finished.

    The standard error is that of the mean, ``s / sqrt(n)`` with ``n - 1`` in the variance; of one run alone, none.
    """
    groups: dict[int, list[Listed]] = {}
    for number, run in zip(series(runs), runs, strict=True):
        groups.setdefault(number, []).append(run)
    return [_gathered(group) if len(group) > 1 else group[0] for group in groups.values()]


def series(runs: Sequence[Listed]) -> list[int]:
    """A number for each run, the same for those that only their seeds tell apart."""
    numbers: dict[str, int] = {}
    found: list[int] = []
    for run in runs:
        settings = {name: value for name, value in run.settings.items() if name not in (SEED, FOLDER)}
        # One whose settings are not known is like no other.
        mark = repr(sorted(settings.items())) if settings else str(run.folder)
        found.append(numbers.setdefault(mark, len(numbers)))
    return found


def _gathered(group: Sequence[Listed]) -> Listed:
    done = [run for run in group if run.facts["state"] == "finished"]
    states = [run.facts["state"] for run in group]
    means: dict[str, float] = {}
    errors: dict[str, float] = {}
    for name in dict.fromkeys(name for run in done for name in run.measured):
        found = [run.measured[name] for run in done if name in run.measured]
        if all(isinstance(value, int | float) and math.isfinite(value) for value in found):
            means[name] = statistics.fmean(found)
            if len(found) > 1:
                errors[name] = statistics.stdev(found) / math.sqrt(len(found))
    facts = {
        **{name: next((run.facts[name] for run in group if run.facts[name]), None) for name in OWN},
        "run": _common_name([run.facts["run"] for run in group]),
        "state": ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)),
        "step": min(run.facts["step"] for run in group),
        "tags": list(dict.fromkeys(tag for run in group for tag in run.facts["tags"])),
    }
    settings = {name: value for name, value in group[0].settings.items() if name not in (SEED, FOLDER)}
    better = {name: way for run in done for name, way in run.better.items()}
    return Listed(group[0].folder, facts, settings, means, better, errors, len(group))


def _common_name(names: Sequence[str]) -> str:
    """What runs are called without their seeds; where that is not one name, the first and how many more."""
    without = {re.sub(r"(^|[,_-])seed[=_-]?\d+", "", name) for name in names}
    return without.pop() if len(without) == 1 else f"{names[0]} and {len(names) - 1} more"
