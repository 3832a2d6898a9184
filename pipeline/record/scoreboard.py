"""Results in a page: a table of models and metrics, and curves over training. Sorting and filtering need the script."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape

from pipeline.record.curves import Curves, Series, chart
from pipeline.record.judging import leading
from pipeline.record.lines import Line, Score, lines, models
from pipeline.record.results import Results

_COLOURS = 6
"""Of the curves of a chart."""
_FAILURES = 8
"""Most failures that are shown unasked."""
_POINTS = 3
"""Fewest checkpoints that make a curve."""
_Z = 1.96
"""Standard errors to each side of an interval of 95 %."""
_KEY = (
    '<p class="keys"><span class="dotted">best of its metric</span>, <strong>bold</strong>: not significantly worse '
    "(5 %, sample by sample where that is known, Holm's correction within the metric). Bars: 95 % intervals, on the "
    "range of the metric.</p>"
)


def scoreboard(results: Results) -> str:
    """All numbers, with what could not be read; a sentence where there are none."""
    damaged = "".join(f"<p class=soft>{escape(sentence)}</p>" for sentence in results.damaged) + _failures(results)
    if not results.rows:
        return f"<h2>Results</h2>{damaged or '<p class=soft>No evaluation was run yet.</p>'}"
    found, names = lines(results.rows), models(results.rows)
    columns = [_column(line) for line in found]
    wide = len(names) > len(found)
    key = _KEY if len(names) > 1 else ""
    return f"<h2>Results</h2>{damaged}{_table(names, columns, by_model=wide)}{key}{_trends(found, names)}"


def _failures(results: Results) -> str:
    """What has failed, with its word; folded where there is much of it."""
    if not results.failed:
        return ""
    rows = "".join(
        f"<tr><th>{escape(one.task)}<small>{escape(one.model)}, {escape(one.time[:16].replace('T', ' '))}</small></th>"
        f"<td class=words>{escape(one.text)}</td></tr>"
        for one in results.failed
    )
    count = len(results.failed)
    is_open = " open" if count <= _FAILURES else ""
    title = f"{count:,} evaluation{'s' * (count > 1)} failed"
    return (
        f'<details class="failures"{is_open}><summary>{title}</summary>'
        f'<div class="scroll"><table>{rows}</table></div></details>'
    )


class _Column:
    """A metric: its title, and a cell for each model."""

    def __init__(self, title: str, cells: list[str]) -> None:
        self.title = title
        self.cells = cells


def _column(line: Line) -> _Column:
    better = line.measured[-1].better
    arrow = {"higher": " &uarr;", "lower": " &darr;"}.get(better or "", "")
    sizes = " / ".join(f"{n:,}" for n in dict.fromkeys(c.n for c in line.measured))
    seeds = f", {len(line.measured[0].rows)} seeds" if len(line.measured[0].rows) > 1 else ""
    title = (
        f"{escape(line.name)}{arrow}<small>{escape(line.evaluation)} on {escape(line.data)}, n = {sizes}{seeds}</small>"
    )
    marks = leading(line) if len(line.cells) > 1 else [""] * len(line.cells)
    span = _span(line)
    cells = [_cell(score, text, mark, span) for score, text, mark in zip(line.cells, line.texts(), marks, strict=True)]
    return _Column(title, cells)


def _span(line: Line) -> tuple[float, float] | None:
    """The range of a metric with its intervals; None where nothing differs or is finite."""
    ends = [c.value + side * _Z * _error(c) for c in line.measured for side in (-1, 1) if math.isfinite(c.value)]
    return (min(ends), max(ends)) if len(line.measured) > 1 and ends and min(ends) < max(ends) else None


def _error(score: Score) -> float:
    return score.stderr if score.stderr is not None and math.isfinite(score.stderr) else 0.0


def _cell(score: Score | None, text: str, mark: str, span: tuple[float, float] | None) -> str:
    if score is None:
        return "<td></td>"
    value, _, error = text.partition(" +- ")
    error = f' <span class="error-bar">&plusmn; {error}</span>' if error else ""
    bar = ""
    if span is not None and math.isfinite(score.value):
        unit = 1 / (span[1] - span[0])
        low, wide = (score.value - _Z * _error(score) - span[0]) * unit, 2 * _Z * _error(score) * unit
        bar = f'<i style="--l:{low:.3f};--w:{wide:.3f}"></i>'
    kind = f' class="{mark}"' if mark else ""
    number = f"{score.value:.6g}" if math.isfinite(score.value) else ""
    return f'<td{kind} data-v="{number}">{value}{error}{bar}</td>'


def _table(names: Sequence[str], columns: Sequence[_Column], by_model: bool) -> str:
    """Models as rows where there are more of them than metrics; the script turns it round."""
    titles = [escape(name) for name in names]
    metrics = [column.title for column in columns]
    if by_model:
        head, rows = metrics, [(name, [c.cells[at] for c in columns]) for at, name in enumerate(titles)]
    else:
        head, rows = titles, [(column.title, column.cells) for column in columns]
    body = "".join(f"<tr><th>{title}</th>{''.join(cells)}</tr>" for title, cells in rows)
    tools = (
        '<div class="tools"><input type="search" placeholder="filter" aria-label="filter rows">'
        '<button type="button">swap rows and columns</button><output></output></div>'
    )
    return (
        f'<div class="board">{tools}<div class="wide"><table class="scores"><thead><tr>'
        f"<th>{'Model' if by_model else 'Metric'}</th>{''.join(f'<th>{title}</th>' for title in head)}</tr></thead>"
        f"<tbody>{body}</tbody></table></div></div>"
    )


def _trends(found: Sequence[Line], names: Sequence[str]) -> str:
    """Charts of the metrics that were measured at three checkpoints of a run or more, a curve for each run."""
    figures = []
    for line in found:
        curves = _series(line, names)
        for first in range(0, len(curves), _COLOURS):
            some = dict(list(curves.items())[first : first + _COLOURS])
            figures.append(_trend(f"{line.name}, {line.data}", some))
    return (
        f'<h3>Over training <small>against steps; bands: 95 % intervals</small></h3><div class="charts">'
        f"{''.join(figures)}</div>"
        if figures
        else ""
    )


def _series(line: Line, names: Sequence[str]) -> dict[str, dict[int, Score]]:
    """The checkpoints of each run by their steps; a run is what models are called without their steps."""
    found: dict[str, dict[int, Score]] = {}
    for name, score in zip(names, line.cells, strict=True):
        if score is not None and score.step:
            run = re.sub(rf"\bstep {score.step}\b", "", name).strip(" :") or line.metric
            found.setdefault(run, {})[score.step] = score
    return {run: dict(sorted(steps.items())) for run, steps in found.items() if len(steps) >= _POINTS}


def _trend(title: str, runs: dict[str, dict[int, Score]]) -> str:
    steps = sorted({step for scores in runs.values() for step in scores})
    series = {}
    for run, scores in runs.items():
        cells = [scores.get(step) for step in steps]
        finite = [c if c is not None and math.isfinite(c.value) else None for c in cells]
        series[f"run/{run}"] = Series(
            [c and c.value for c in finite],
            [c and c.value - _Z * _error(c) for c in finite],
            [c and c.value + _Z * _error(c) for c in finite],
            [c is not None and not math.isfinite(c.value) for c in cells],
        )
    return chart(title, list(series), Curves([float(step) for step in steps], steps, "steps", [], series))
