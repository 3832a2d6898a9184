"""One number of several of the same model, in a stated way; where one of them lacks there is none, and a word why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.config.schema import Average
from pipeline.core.errors import DataError
from pipeline.core.evaluation import Number
from pipeline.dist.meeting import Failure
from pipeline.record.outputs import keep
from pipeline.record.records import About, outcomes
from pipeline.record.results import Origin, Row
from pipeline.suites.running import Asked, Done


class Member(NamedTuple):
    """What a task has given."""

    task: str
    """Name of the evaluation."""
    data_name: str
    """Of the data set."""
    title: str
    rows: Sequence[Row] | None
    """Its numbers; None: it has failed."""

    def matching(self, pattern: str) -> list[Row]:
        """Its numbers whose metric fits a pattern.

        Raises:
            DataError: there is none.
        """
        if self.rows is None:
            raise DataError(f"{self.title} has failed")
        if found := [row for row in self.rows if fnmatchcase(row.metric, pattern)]:
            return found
        raise DataError(f"{self.title} has no number like {pattern!r}")


def keep_averages(asked: Asked, subject: str, folder: Path, done: Sequence[Done]) -> list[Done]:
    """The averages of a suite for one subject, each in a record of its own. On rank 0.

    Args:
        asked: the suite.
        subject: as it was named.
        folder: of the results.
        done: what has come of its tasks, in their order.
    """
    given = [
        Member(task.name, task.data_name, one.title, one.results.rows if one.results is not None else None)
        for task, one in zip(asked.tasks, done, strict=True)
    ]
    kept: list[Done] = []
    for name, average in asked.plan.groups.items():
        title = f"average {name}"
        try:
            found = members(average, given)
            about = About(subject, asked.suite, asked.plan.version, group=name)
            results = keep(folder, [averaged(name, average, found)], group_origin(name, average, found), about)
            kept.append(Done(title, done[0].subject, done[0].told, folder, None, results))
        except (DataError, OSError) as error:
            kept.append(Done(title, done[0].subject, done[0].told, folder, Failure(f"there is none: {error}", "")))
    return kept


def members(average: Average, given: Sequence[Member]) -> dict[str, list[Row]]:
    """Data set to its numbers that are averaged.

    Raises:
        DataError: one lacks.
    """
    found: dict[str, list[Row]] = {}
    own = average.metrics if isinstance(average.metrics, dict) else None
    for member in given:
        if average.on and member.data_name not in average.on:
            continue
        patterns = [own.get(member.data_name, "")] if own is not None else average.metrics
        for pattern in patterns:
            if pattern and fnmatchcase(member.task, pattern.partition("/")[0]):
                found.setdefault(member.data_name, []).extend(member.matching(pattern))
    asked = own or average.on
    if lacking := [name for name in asked if name not in found]:
        raise DataError(f"no evaluation on {lacking[0]} has such metrics")
    if not found:
        raise DataError(f"no evaluation of the suite has such metrics: {', '.join(average.metrics)}")
    if len({row.better for rows in found.values() for row in rows}) > 1:
        raise DataError("of some metrics more is better and of others less, so that their average says nothing")
    return found


def averaged(name: str, average: Average, found: Mapping[str, Sequence[Row]]) -> Number:
    """The average with its standard error.

    Numbers of one data set are averaged first, as if they were the same number: they are of the same samples, so that
    their errors do not cancel. Data sets are independent of each other: se^2 = sum w_i^2 se_i^2.

    Args:
        name: of the group.
        average: "macro": w_i = 1 / data sets; "micro": w_i = n_i / sum of n.
        found: data set to its numbers, from :func:`members`.
    """
    sizes = np.array([max(row.n for row in rows) for rows in found.values()], np.float64)
    weight = sizes / sizes.sum() if average.average == "micro" else np.full(len(sizes), 1 / len(sizes))
    value = float(weight @ [float(np.mean([row.value for row in rows])) for rows in found.values()])
    errors = [_error(rows) for rows in found.values()]
    parts = [w * e for w, e in zip(weight, errors, strict=True) if e is not None]
    stderr = math.hypot(*parts) if len(parts) == len(errors) else None
    first = next(iter(found.values()))[0]
    splits = dict.fromkeys(row.split for rows in found.values() for row in rows)
    samples, sources = _samples(found, weight * sizes.sum() / sizes)
    title, n = f"{name}/{average.average}", int(sizes.sum())
    return Number(title, value, n, ", ".join(splits), stderr, first.better, samples, sources)


def _error(rows: Sequence[Row]) -> float | None:
    errors = [row.stderr for row in rows]
    return None if any(e is None for e in errors) else float(np.mean([e or 0.0 for e in errors]))


def _samples(found: Mapping[str, Sequence[Row]], scale: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
    """What each sample of all data sets adds to the average, so that models are compared by it sample by sample."""
    values: list[np.ndarray] = []
    sources: list[np.ndarray] = []
    base = 0
    for rows, factor in zip(found.values(), scale, strict=True):
        if len(rows) > 1 or rows[0].outcomes is None:
            return None, None
        kept = outcomes(rows[0].outcomes, rows[0].n)
        values.append(kept.values.astype(np.float32) * np.float32(factor))
        own = np.arange(rows[0].n) if kept.sources is None else np.unique(kept.sources, return_inverse=True)[1]
        sources.append(base + own)
        base += int(own.max()) + 1
    shared = np.concatenate(sources)
    return np.concatenate(values), shared if len(np.unique(shared)) < len(shared) else None


def group_origin(name: str, average: Average, found: Mapping[str, Sequence[Row]]) -> Origin:
    """What decides the average: all that decides its parts."""
    parts = {
        data: [[row.metric, row.split, row.version, row.config, row.seed] for row in rows]
        for data, rows in found.items()
    }
    marks = {
        f"{data}.{use}".lstrip("."): mark
        for data, rows in found.items()
        for row in rows
        for use, mark in row.manifests.items()
    }
    row = next(iter(found.values()))[0]
    settings: dict[str, Any] = {"group": name, "average": average.average, "parts": parts}
    if row.limit is not None:
        settings["limit"] = row.limit
    return Origin(row.model, row.step, row.weights, "group", settings, marks)
