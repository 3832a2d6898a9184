"""Confusion matrices as heat maps: how often images of a class (rows) were taken for which (columns)."""

from __future__ import annotations

import io
import re
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.record.pictures import Shot, Shown, shot
from pipeline.record.results import KeptTable

NAME = re.compile(r".*/confusion(_.*)?")
"""Of tables that hold such a matrix: a row for each true class, with its name and a count for each class."""
CELLS = 32
"""Most classes that are shown cell by cell; of more a picture is drawn."""
PAIRS = 8
"""Most pairs of classes that are listed."""
_INK = np.array([37.0, 99.0, 201.0])


class Matrix(NamedTuple):
    """Of K classes."""

    true: list[str]
    taken: list[str]
    counts: np.ndarray
    """float64[K,K], rows are true classes."""

    @property
    def shares(self) -> np.ndarray:
        """Of each true class; zero where it has no image."""
        return self.counts / np.maximum(self.counts.sum(1, keepdims=True), 1)


def matrix_of(table: KeptTable) -> Matrix | None:
    """The matrix that a table holds; None where it holds none."""
    if not NAME.fullmatch(table.metric) or not table.rows or len(table.columns) < 2:
        return None
    cells = [row[1:] for row in table.rows]
    if not all(isinstance(cell, int | float) and cell >= 0 for row in cells for cell in row):
        return None
    return Matrix([str(row[0]) for row in table.rows], list(table.columns[1:]), np.array(cells, dtype=np.float64))


def heat_map(found: Matrix) -> str:
    """HTML of a matrix, and of the classes that are confused most."""
    small = max(found.counts.shape) <= CELLS
    return f'<div class="scroll">{_cells(found) if small else _picture(found)}{_confused(found)}</div>'


def _cells(found: Matrix) -> str:
    head = "".join(f"<th><span>{escape(name)}</span></th>" for name in found.taken)
    body = []
    for name, counts, shares in zip(found.true, found.counts, found.shares, strict=True):
        cells = "".join(
            f'<td style="--p:{100 * share:.0f}%"{" class=strong" if share > 0.5 else ""}'
            f' title="{escape(name)} taken for {escape(found.taken[k])}: {share:.1%}">{_count(count)}</td>'
            for k, (count, share) in enumerate(zip(counts, shares, strict=True))
        )
        body.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    corner = "<th>true, taken for</th>"
    return f'<table class="heat"><thead><tr>{corner}{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def _count(count: float) -> str:
    return "" if count == 0 else f"{count:,.0f}" if count == int(count) else f"{count:.3g}"


def _picture(found: Matrix) -> str:
    """A pixel for each pair of classes; the darker, the larger the share of the true class (its square root)."""
    ink = np.sqrt(found.shares)[..., None]
    pixels = (255 * (1 - ink) + _INK * ink).round().astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "WEBP", lossless=True)
    rows, columns = found.counts.shape
    caption = f"{rows:,} true classes downwards, {columns:,} that they were taken for to the right"
    return f'<div class="shots">{shot(Shot(Shown("", Path(), caption), data.getvalue(), columns, rows))}</div>'


def _confused(found: Matrix) -> str:
    """The pairs that are confused most often, of those that have equal names on both sides."""
    at = {name: k for k, name in enumerate(found.taken)}
    wrong = found.counts.copy()
    for row, name in enumerate(found.true):
        if name in at:
            wrong[row, at[name]] = 0
    order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    pairs = [(int(i), int(k)) for i, k in zip(*np.unravel_index(order, wrong.shape), strict=True)]
    said = [
        f"{escape(found.true[i])} for {escape(found.taken[k])}: {_count(wrong[i, k])} ({found.shares[i, k]:.0%})"
        for i, k in pairs
        if wrong[i, k] > 0
    ]
    return f"<p class=soft>Taken most often: {'; '.join(said)}.</p>" if said else ""
