"""Results side by side: a line for what was measured in the same way on the same data, a column for each model."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pipeline.record.formats import decimals, far_apart, short, with_error
from pipeline.record.results import Found, Row

F = TypeVar("F", bound=Found)

_APART = 24
"""Most letters of a value that tells lines apart."""


@dataclass(frozen=True)
class Score:
    """A number of one model: of one seed, or the mean over several."""

    rows: tuple[Row, ...]
    """By seed."""
    value: float
    stderr: float | None
    """Of the samples, and of the seeds where there are several; None where neither is known."""

    @property
    def n(self) -> int:
        """Samples."""
        return self.rows[0].n

    @property
    def better(self) -> Literal["higher", "lower"] | None:
        """Which way is good."""
        return self.rows[0].better

    @property
    def step(self) -> int | None:
        """Of the checkpoint."""
        return self.rows[0].step

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """Of the rows."""
        return tuple(row.seed for row in self.rows)


@dataclass(frozen=True)
class Line:
    """One line of the table: a number of all models, measured with the same settings on the same data."""

    evaluation: str
    metric: str
    split: str
    apart: str
    """What tells it from other lines of the same metric: "temperature=0.1"; empty where it needs nothing."""
    cells: tuple[Score | None, ...]
    """By model, in the order of :func:`models`."""

    @property
    def name(self) -> str:
        """The metric, told apart."""
        return f"{self.metric} [{self.apart}]" if self.apart else self.metric

    @property
    def measured(self) -> list[Score]:
        """The cells that hold a number."""
        return [c for c in self.cells if c is not None]

    @property
    def data(self) -> str:
        """What it was measured on, as the suite calls it: the set of streams, else the stream."""
        return self.measured[-1].rows[0].data_name or self.split

    @property
    def best(self) -> float | None:
        """The best value; None where there is nothing to compare or neither direction is good."""
        finite = [c.value for c in self.measured if math.isfinite(c.value)]
        better = self.measured[-1].better
        if better is None or len(finite) < 2:
            return None
        return max(finite) if better == "higher" else min(finite)

    @property
    def places(self) -> int:
        """Digits after the point that are worth printing."""
        return decimals([c.value for c in self.measured], [c.stderr for c in self.measured if c.stderr is not None])

    def texts(self) -> list[str]:
        """What to print for each cell; empty where nothing was measured."""
        if far_apart([c.value for c in self.measured], [c.stderr for c in self.measured if c.stderr is not None]):
            return ["" if c is None else short(c.value) for c in self.cells]
        places = self.places
        return ["" if c is None else with_error(c.value, c.stderr, places) for c in self.cells]


def columns(results: Sequence[Found]) -> dict[tuple[str, str], str]:
    """Model and weights to the name of their column: models that are not checkpoints first, then by step."""
    first = {(row.model, row.weights): (row.step is not None, row.step or 0) for row in results}
    times = Counter(model for model, _ in first)
    found = sorted(first, key=lambda column: first[column])
    return {
        (model, weights): model if times[model] == 1 else f"{model} ({weights[:6] or 'earlier'})"
        for model, weights in found
    }


def models(results: Sequence[Found]) -> list[str]:
    """Columns of the table; of one name with several weights, each with the beginning of its hash."""
    return list(columns(results).values())


def lines(results: Sequence[Row]) -> list[Line]:
    """Lines of the table, in the order in which the metrics first came.

    Where all models were measured with the same several seeds, the line holds their means over them.
    """
    found = []
    for apart, cells in aligned(_together(results)):
        row = next(c for c in cells if c is not None).rows[0]
        found.append(Line(row.evaluation, row.metric, row.split, apart, tuple(c and c.score for c in cells)))
    return found


@dataclass(frozen=True, kw_only=True)
class _Seeds(Found):
    """Rows that only their seeds tell apart, as one result."""

    rows: tuple[Row, ...]

    @property
    def score(self) -> Score:
        return score(self.rows)


def score(rows: Sequence[Row]) -> Score:
    """One row as it is, or the mean of several seeds' rows with a standard error of seeds and samples."""
    if len(rows) == 1:
        return Score(tuple(rows), rows[0].value, rows[0].stderr)
    from pipeline.record.judging import mean_over_seeds  # with SciPy, which is slow to import and seldom needed

    mean = mean_over_seeds(rows)
    return Score(tuple(rows), mean.value, None if math.isnan(mean.error) else mean.error)


def _together(results: Sequence[Row]) -> list[_Seeds]:
    """Rows of several seeds as one, where every model has the same seeds."""
    alike: dict[tuple[object, ...], dict[tuple[str, str], list[Row]]] = {}
    for row in results:
        alike.setdefault(row.task, {}).setdefault((row.model, row.weights), []).append(row)
    merged = {
        what
        for what, of_models in alike.items()
        if len({tuple(sorted(str(row.seed) for row in rows)) for rows in of_models.values()}) == 1
    }
    found = []
    for row in results:
        rows = alike[row.task][row.model, row.weights]
        if row.task not in merged or len(rows) == 1:
            found.append(_seeds([row], row.seed))
        elif row is rows[0]:
            found.append(_seeds(sorted(rows, key=lambda one: (one.seed is not None, one.seed)), None))
    return found


def _seeds(rows: Sequence[Row], seed: int | None) -> _Seeds:
    shared: dict[str, Any] = {name: getattr(rows[0], name) for name in Found.__dataclass_fields__}
    return _Seeds(**{**shared, "seed": seed}, rows=tuple(rows))


def aligned(results: Sequence[F]) -> list[tuple[str, tuple[F | None, ...]]]:
    """Results of one kind, those that only the model tells apart together, in the order in which they first came.

    Returns:
        Of each group what tells it from others of its name, and its results in the order of :func:`models`.
    """
    order = columns(results)
    found: dict[tuple[object, ...], dict[tuple[str, str], F]] = {}
    for row in results:
        found.setdefault(row.what, {})[row.model, row.weights] = row
    alike: dict[tuple[str, str, str], list[F]] = {}
    for cells in found.values():
        row = next(iter(cells.values()))
        alike.setdefault((row.evaluation, row.metric, row.split), []).append(row)
    together: list[tuple[str, tuple[F | None, ...]]] = []
    for group in alike.values():
        for row, fact in zip(group, apart(group), strict=True):
            together.append((fact, tuple(found[row.what].get(column) for column in order)))
    return together


def apart(group: Sequence[Found]) -> list[str]:
    """What tells rows of one metric from each other, for each of them."""
    facts = [facts_of(row) for row in group]
    keys = dict.fromkeys(key for fact in facts for key in fact)
    data = {(row.data_name, tuple(sorted(row.manifests.items()))) for row in group}
    if all(name for name, _ in data) and len({name for name, _ in data}) == len(data):
        keys = [key for key in keys if not key.endswith(" data")]  # their names stand beside
    # What was measured on a few samples alone is never taken for the whole.
    differ = [key for key in keys if key == "limit" or len({json.dumps(fact.get(key)) for fact in facts}) > 1]
    return [", ".join(f"{key}={short_fact(fact[key])}" for key in differ if key in fact) for fact in facts]


def facts_of(row: Found) -> dict[str, Any]:
    """All that decides a result but the model, by names that a person knows."""
    facts = _flat(row.settings, "")
    if not row.settings:
        facts["settings"] = row.config[:6]
    facts |= {f"{use} data": mark[:6] for use, mark in row.manifests.items()}
    return facts | {"seed": row.seed, "version": row.version}


def _flat(table: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """``{"image": {"size": 224}}`` as ``{"image.size": 224}``."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def short_fact(value: Any) -> str:
    """A setting's value, cut where it is long."""
    if isinstance(value, float):
        exact, rounded = json.dumps(value), f"{value:.6g}"
        return rounded if len(exact) > len(rounded) + 2 else exact  # 0.9032258064516129, but 1.0 as it was written
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _APART else text[: _APART - 3] + "..."
