"""Results side by side: a line for what was measured in the same way on the same data, a column for each model."""

from __future__ import annotations

import io
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.record.formats import decimals, with_error
from pipeline.record.results import Found, KeptTable, Results, Row

F = TypeVar("F", bound=Found)

_PLAIN_WIDTH = 240
"""Columns a table may take where no terminal sets them: in a log, a wrapped cell is harder to read than a long line."""
_APART = 24
"""Most letters of a value that tells lines apart."""


@dataclass(frozen=True)
class Line:
    """One line of the table: a number of all models, measured with the same settings on the same data."""

    evaluation: str
    metric: str
    split: str
    apart: str
    """What tells it from other lines of the same metric: "temperature=0.1"; empty where it needs nothing."""
    cells: tuple[Row | None, ...]
    """By model, in the order of :func:`models`."""

    @property
    def name(self) -> str:
        """The metric, told apart."""
        return f"{self.metric} [{self.apart}]" if self.apart else self.metric

    @property
    def measured(self) -> list[Row]:
        """The cells that hold a number."""
        return [c for c in self.cells if c is not None]

    @property
    def best(self) -> float | None:
        """The best value; None where there is nothing to compare or neither direction is good."""
        finite = [c.value for c in self.measured if math.isfinite(c.value)]
        better = self.measured[-1].better
        if better is None or len(finite) < 2:
            return None
        return max(finite) if better == "higher" else min(finite)

    def texts(self) -> list[str]:
        """What to print for each cell; empty where nothing was measured."""
        places = decimals([c.value for c in self.measured], [c.stderr for c in self.measured if c.stderr is not None])
        return ["" if c is None else with_error(c.value, c.stderr, places) for c in self.cells]


def _columns(results: Sequence[Found]) -> dict[tuple[str, str], str]:
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
    return list(_columns(results).values())


def lines(results: Sequence[Row]) -> list[Line]:
    """Lines of the table, in the order in which the metrics first came."""
    found = []
    for apart, cells in aligned(results):
        row = next(c for c in cells if c is not None)
        found.append(Line(row.evaluation, row.metric, row.split, apart, cells))
    return found


def aligned(results: Sequence[F]) -> list[tuple[str, tuple[F | None, ...]]]:
    """Results of one kind, those that only the model tells apart together, in the order in which they first came.

    Returns:
        Of each group what tells it from others of its name, and its results in the order of :func:`models`.
    """
    columns = _columns(results)
    found: dict[tuple[object, ...], dict[tuple[str, str], F]] = {}
    for row in results:
        found.setdefault(row.what, {})[row.model, row.weights] = row
    alike: dict[tuple[str, str, str], list[F]] = {}
    for cells in found.values():
        row = next(iter(cells.values()))
        alike.setdefault((row.evaluation, row.metric, row.split), []).append(row)
    together: list[tuple[str, tuple[F | None, ...]]] = []
    for group in alike.values():
        for row, apart in zip(group, _apart(group), strict=True):
            together.append((apart, tuple(found[row.what].get(column) for column in columns)))
    return together


def _apart(group: Sequence[Found]) -> list[str]:
    """What tells rows of one metric from each other, for each of them."""
    facts = [_flat(row.settings, "") for row in group]
    for fact, row in zip(facts, group, strict=True):
        if not row.settings:
            fact["settings"] = row.config[:6]
        fact |= {f"{use} data": mark[:6] for use, mark in row.manifests.items()}
        fact |= {"seed": row.seed, "version": row.version}
    keys = dict.fromkeys(key for fact in facts for key in fact)
    differ = [key for key in keys if len({json.dumps(fact.get(key)) for fact in facts}) > 1]
    return [", ".join(f"{key}={_short(fact[key])}" for key in differ if key in fact) for fact in facts]


def _flat(table: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """``{"image": {"size": 224}}`` as ``{"image.size": 224}``."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _APART else text[: _APART - 3] + "..."


def table_text(results: Sequence[Row]) -> str:
    """The comparison as standard output shows it."""
    text = io.StringIO()
    table(results, text, like=sys.stdout)
    return text.getvalue().rstrip("\n")


def table(results: Sequence[Row], stream: TextIO, like: TextIO | None = None) -> None:
    """Print the comparison: metrics as rows, models as columns, the best of each row in bold on a terminal.

    Args:
        results: what is compared.
        stream: where it goes.
        like: how wide and bold it is, is as for this stream; left out: ``stream``.
    """
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("metric")
    shown.add_column("split")
    for model in models(results):
        shown.add_column(Text(model), justify="right")
    found = lines(results)
    for line in found:
        cells = [
            Text(text, style="bold" if row is not None and row.value == line.best else "")
            for row, text in zip(line.cells, line.texts(), strict=True)
        ]
        shown.add_row(Text(line.name), Text(line.split), *cells)
    _print(shown, stream, (like or stream).isatty())


def _print(shown: Table, stream: TextIO, terminal: bool) -> None:
    width = None if terminal else _PLAIN_WIDTH
    Console(file=stream, width=width, force_terminal=terminal or None).print(shown)


def found_text(folder: Path, new: Results) -> str:
    """A word of each table and figure, which are too big for a terminal; empty where there is none."""
    said = [f"table {t.metric} on {t.split}, {len(t.rows):,} rows: {folder / t.record}" for t in new.tables]
    return "\n".join(said + [f"figure {f.metric} on {f.split}: {folder / f.file}" for f in new.figures])


def whole_text(found: KeptTable) -> str:
    """A table of an evaluation with all its rows."""
    text = io.StringIO()
    shown = Table(title=Text(f"{found.metric} on {found.split}, {found.model}"), box=box.SIMPLE_HEAD, pad_edge=False)
    for column in found.columns:
        shown.add_column(Text(column))
    for row in found.rows:
        shown.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    _print(shown, text, sys.stdout.isatty())
    return text.getvalue().rstrip("\n")
