"""Numbers of two models, measured alike, judged by all that is known of them: outcomes of samples, seeds, errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from pipeline.core.errors import DataError
from pipeline.record import statistics
from pipeline.record.lines import Line, Score
from pipeline.record.records import outcomes
from pipeline.record.results import Kept, Row
from pipeline.record.statistics import Difference, Mean, Outcomes

UNKNOWN = Difference(math.nan, math.nan, math.nan, math.nan, math.nan, "no error is known")
"""Of numbers without standard error and outcomes."""


def mean_over_seeds(rows: Sequence[Row]) -> Mean:
    """Of one number, measured with several seeds."""
    known = [_outcomes(row) for row in rows]
    values = [one.values for one in known if one is not None]
    if len(values) == len(rows) and len({v.shape for v in values}) == 1:
        return statistics.over_seeds(np.stack(values), known[0] and known[0].sources)
    return statistics.seeds_alone([row.value for row in rows], [row.stderr for row in rows])


def judge(first: Score, second: Score) -> Difference:
    """Second minus first: of samples in pairs where both tell of theirs, else from their standard errors.

    Seeds that only one of them has are left out.
    """
    rows = _by_seed(first, second)
    pairs = [pair for pair in (_pair(a, b) for a, b in rows) if pair is not None]
    if len(pairs) == len(rows):
        return statistics.paired_over_seeds(*zip(*pairs, strict=True))
    why = _why_unpaired(rows)
    if len(rows) > 1:
        return _because(statistics.seeds_unpaired(*zip(*(map(_measured, pair) for pair in rows), strict=True)), why)
    (a, b) = rows[0]
    if a.stderr is None or b.stderr is None:
        return UNKNOWN._replace(value=b.value - a.value)
    return _because(statistics.unpaired((a.value, a.stderr), (b.value, b.stderr)), why)


def leading(line: Line) -> list[str]:
    """Of each cell: "best", "level" (not significantly worse than it, after Holm's correction in the line), or ""."""
    best = line.best
    marks = ["best" if c is not None and c.value == best else "" for c in line.cells]
    if best is None:
        return marks
    top = next(c for c, mark in zip(line.cells, marks, strict=True) if c is not None and mark)
    others = [
        (at, cell)
        for at, cell in enumerate(line.cells)
        if cell is not None and not marks[at] and math.isfinite(cell.value)
    ]
    corrected = statistics.holm([_p_value(top, cell) for _, cell in others])
    for (at, _), p in zip(others, corrected, strict=True):
        marks[at] = "level" if p >= 1 - statistics.LEVEL else ""
    return marks


def _p_value(first: Score, second: Score) -> float:
    """That of :func:`judge`, as quickly as can be."""
    if len(first.rows) == len(second.rows) == 1 and (pair := _pair(first.rows[0], second.rows[0])):
        return statistics.p_value(*pair)
    return judge(first, second).p


def _by_seed(first: Score, second: Score) -> list[tuple[Row, Row]]:
    own = {row.seed: row for row in second.rows}
    return [(row, own[row.seed]) for row in first.rows if row.seed in own]


def _pair(first: Row, second: Row) -> tuple[Outcomes, Outcomes] | None:
    """What the samples of both add, where that is known of the same ones."""
    a, b = _outcomes(first), _outcomes(second)
    if a is None or b is None or a.values.shape != b.values.shape or not _same(a.sources, b.sources):
        return None
    return a, b


def _same(first: np.ndarray | None, second: np.ndarray | None) -> bool:
    return first is second or (first is not None and second is not None and np.array_equal(first, second))


def _why_unpaired(rows: Sequence[tuple[Row, Row]]) -> str:
    """In words, where it is not simply that a number is no mean over samples."""
    for pair in rows:
        for row in pair:
            if row.outcomes is not None and _outcomes(row) is None:
                return f"{row.outcomes.file.name} cannot be read"
    if any((a.outcomes is None) != (b.outcomes is None) for a, b in rows):
        return "one tells nothing of its samples"
    return ""


def _because(found: Difference, why: str) -> Difference:
    return found._replace(method=f"{found.method} ({why})") if why else found


def _measured(row: Row) -> tuple[float, float | None]:
    return row.value, row.stderr


def _outcomes(row: Row) -> Outcomes | None:
    """What the samples add; None where that was not kept, cannot be read or is not finite."""
    return None if row.outcomes is None else _read(row.outcomes, row.n)


@lru_cache(maxsize=64)
def _read(kept: Kept, n: int) -> Outcomes | None:
    try:
        found = outcomes(kept, n)
    except DataError:
        return None
    return found if found.values.dtype == bool or np.isfinite(found.values).all() else None
