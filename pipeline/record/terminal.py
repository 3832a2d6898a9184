"""Results as a terminal and a log show them."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.record.judging import leading
from pipeline.record.lines import lines, models
from pipeline.record.results import KeptTable, Results, Row

_PLAIN_WIDTH = 240
"""Columns a table may take where no terminal sets them: in a log, a wrapped cell is harder to read than a long line."""


def table_text(results: Sequence[Row]) -> str:
    """The comparison as standard output shows it."""
    text = io.StringIO()
    table(results, text, like=sys.stdout)
    return text.getvalue().rstrip("\n")


def results_text(results: Results) -> str:
    """The comparison, what has failed, and what cannot be read."""
    failed = [f"failed: {one.task}, {one.model}: {one.text}" for one in results.failed]
    return "\n".join([table_text(results.rows), *failed, *results.damaged])


def table(results: Sequence[Row], stream: TextIO, like: TextIO | None = None) -> None:
    """Print the comparison: metrics as rows, models as columns.

    On a terminal the best of each row is bold, and so is what is not significantly worse.

    Args:
        results: what is compared.
        stream: where it goes.
        like: how wide and bold it is, is as for this stream; left out: ``stream``.
    """
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("metric")
    shown.add_column("data")
    for model in models(results):
        shown.add_column(Text(model), justify="right")
    found = lines(results)
    for line in found:
        cells = [
            Text(text, style="bold" if mark else "") for text, mark in zip(line.texts(), leading(line), strict=True)
        ]
        shown.add_row(Text(line.name), Text(line.data), *cells)
    print_table(shown, stream, (like or stream).isatty())


def print_table(shown: Table, stream: TextIO, terminal: bool) -> None:
    """Print a table as wide as the terminal, or as a log may be."""
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
    print_table(shown, text, sys.stdout.isatty())
    return text.getvalue().rstrip("\n")
