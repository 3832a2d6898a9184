"""A page of many runs that needs nothing else, neither files nor network: a table to sort and filter, and a plot of
any metric against any setting.

The table is plain HTML, so that it is all there without the script, which sorts, hides rows and draws.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from html import escape
from importlib import resources
from typing import Any

from pipeline.record.files import dumps
from pipeline.record.formats import decimals, short, with_error
from pipeline.record.runs import FOLDER, SEED, Listed, differing, direction, series

SHOWN = 6
"""Settings that have a column from the start; the others are chosen on the page."""
_PLAIN = {"samples", "epoch", "attempt", "data_digest"}
"""Of a metrics line what no column is made of."""
_COLOURS = {"finished": "finished", "running": "running", "failed": "failed", "died": "failed", "unreadable": "failed"}


@dataclass(frozen=True)
class Column:
    """One quantity of all runs."""

    name: str
    kind: str
    """"fact", "result", "metric" or "setting"."""
    cells: list[Any]
    """Numbers or texts by run; None where a run has none."""
    better: str | None
    shown: bool
    """From the start."""

    @cached_property
    def numeric(self) -> bool:
        """Whether all its cells are numbers."""
        return all(cell is None or _is_number(cell) for cell in self.cells)


def index_page(runs: Sequence[Listed]) -> str:
    """HTML of the page.

    Args:
        runs: in the order of the table, their settings read.
    """
    root = _root(runs)
    apart = differing([run.settings for run in runs])
    columns = _columns(runs, apart)
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    shared = _shared(runs, apart)
    data = {
        "columns": [{"name": c.name, "kind": c.kind, "numeric": c.numeric, "better": c.better} for c in columns],
        "cells": [[_plain(column.cells[row]) for column in columns] for row in range(len(runs))],
        "names": [_name(run, root) for run in runs],
        "series": series(runs),
    }
    # The policy is a promise that the browser keeps: this page loads nothing.
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{escape(root or "runs")} - Sluice</title><style>{_asset("page.css")}{_asset("index.css")}</style></head>
<body>{_header(runs, root)}{_controls()}{_table(runs, columns, root)}{shared}
<footer>Written by Sluice, {now}.</footer>
<script type="application/json" id="runs">{_in_script(data)}</script>
<script>{_asset("index.js")}</script></body></html>
"""


def _asset(name: str) -> str:
    return resources.files("pipeline.record").joinpath(name).read_text(encoding="utf-8")


def _in_script(value: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    return dumps(value).replace("<", "\\u003c")


def _root(runs: Sequence[Listed]) -> str:
    """The folder that all are in."""
    return os.path.commonpath([str(run.folder.parent) for run in runs]) if runs else ""


def _name(run: Listed, root: str) -> str:
    return os.path.relpath(run.facts["run"], root) if root else str(run.facts["run"])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """A cell as the script takes it: a finite number, a text or nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return value if _is_number(value) else _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)


def _columns(runs: Sequence[Listed], settings: Mapping[str, Sequence[Any]]) -> list[Column]:
    """What is told of the runs: how far they are, results, metrics, and the settings in which they differ."""
    results = dict.fromkeys(name for run in runs for name in run.better)
    metrics = dict.fromkeys(name for run in runs for name in run.measured if name not in results)

    def column(name: str, kind: str, shown: bool) -> Column:
        return Column(name, kind, [run.values.get(name) for run in runs], direction(name, runs), shown)

    few = [name for name in settings if name != SEED][:SHOWN]
    return [
        column("state", "fact", True),
        column("step", "fact", True),
        *(column(name, "result", True) for name in results),
        *(column(name, "metric", name in ("loss", "samples_per_second")) for name in metrics if name not in _PLAIN),
        *(column(name, "setting", name in few or name == SEED) for name in settings),
        column("tags", "fact", any(run.facts["tags"] for run in runs)),
        column("note", "fact", any(run.facts["note"] or run.facts["error"] for run in runs)),
    ]


def _header(runs: Sequence[Listed], root: str) -> str:
    counts = Counter(str(run.facts["state"]) for run in runs)
    chips = "".join(
        f'<button class="state {_colour(state)}" data-state="{escape(state)}">{count:,} {escape(state)}</button>'
        for state, count in counts.most_common()
    )
    return (
        f'<header><p class="brand">Sluice runs</p><div class="title"><h1>{escape(root or "runs")}</h1></div>'
        f'<p class="about"><span>{len(runs):,} run{"s" * (len(runs) != 1)}</span></p>'
        f'<p class="chips">{chips}</p></header>'
    )


def _colour(state: str) -> str:
    return _COLOURS.get(state, "requeue")


def _controls() -> str:
    """What the script fills in; hidden without it."""
    selects = "".join(
        f'<label>{title}<select id="{name}"></select></label>'
        for name, title in (("y", "Metric"), ("x", "against"), ("colour", "coloured by"))
    )
    return (
        f'<section class="panel" hidden><div class="choices">{selects}'
        '<label class="tick"><input type="checkbox" id="gather" checked/>mean of seeds</label>'
        '<span class="legend" id="legend"></span></div>'
        '<div class="scatter" id="plot"><output class="tip" hidden></output></div></section>'
        '<section class="bar" hidden><input type="search" id="filter" spellcheck="false" autocomplete="off"'
        ' placeholder="Filter: words, or optimizer.lr &gt; 1e-4 and state = finished"/>'
        '<output id="count"></output><details id="chooser"><summary>Columns</summary><div></div></details></section>'
    )


def _table(runs: Sequence[Listed], columns: Sequence[Column], root: str) -> str:
    heads = "".join(_head(number, column) for number, column in enumerate(columns))
    texts = [_texts(column, runs) for column in columns]
    rows = []
    for row, run in enumerate(runs):
        cells = "".join(
            f"<td{_kind(column)}{' hidden' * (not column.shown)}>{texts[number][row]}</td>"
            for number, column in enumerate(columns)
        )
        rows.append(f"<tr><th>{escape(_name(run, root))}</th>{cells}</tr>")
    return (
        f'<div class="wide"><table id="table"><thead><tr><th data-column="-1"><button>run</button></th>{heads}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _kind(column: Column) -> str:
    return "" if column.numeric and column.name != "note" else " class=text"


def _head(number: int, column: Column) -> str:
    arrow = {"higher": " &uarr;", "lower": " &darr;"}.get(column.better or "", "") if column.kind == "result" else ""
    title, _, last = column.name.rpartition(".") if column.kind == "setting" else ("", "", column.name)
    above = f"<small>{escape(title)}</small>" if title else ""
    return (
        f'<th{_kind(column)} data-column="{number}"{" hidden" * (not column.shown)}>'
        f"<button>{above}{escape(last)}{arrow}</button></th>"
    )


def _texts(column: Column, runs: Sequence[Listed]) -> list[str]:
    """HTML of a column's cells; of one whose metric has a standard error, to the place that this gives."""
    errors = [run.errors.get(column.name) for run in runs]
    places = decimals([], [error for error in errors if error is not None])
    return [
        _cell(column, run, cell, error, places) for run, cell, error in zip(runs, column.cells, errors, strict=True)
    ]


def _cell(column: Column, run: Listed, cell: Any, error: float | None, places: int) -> str:
    if column.kind == "fact":
        return _FACTS[column.name](run)
    if cell is None or not _is_number(cell):
        return "" if cell is None else escape(_text(cell))
    if error is None:
        return escape(short(cell))
    value, _, stderr = with_error(cell, error, places).partition(" +- ")
    return f'{value} <span class="error-bar">&plusmn; {stderr}</span>'


def _state(run: Listed) -> str:
    state = str(run.facts["state"])
    return f'<span class="state {_colour(state)}">{escape(state)}</span>'


def _step(run: Listed) -> str:
    step, total = run.facts["step"], run.facts["total_steps"]
    return f"{step:,}" + (f"<small> / {total:,}</small>" if total and total != step else "")


def _tags(run: Listed) -> str:
    return " ".join(f"<mark>{escape(tag)}</mark>" for tag in run.facts["tags"])


def _note(run: Listed) -> str:
    failed = run.facts["error"]
    return f'<span class="wrong">{escape(failed)}</span>' if failed else escape(run.facts["note"] or "")


_FACTS = {"state": _state, "step": _step, "tags": _tags, "note": _note}


def _shared(runs: Sequence[Listed], apart: Mapping[str, Sequence[Any]]) -> str:
    """The settings that all runs have in common, folded."""
    if not runs or not runs[0].settings:
        return ""
    same = {name: value for name, value in runs[0].settings.items() if name not in apart and name != FOLDER}
    pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(_text(value))}</dd>" for name, value in sorted(same.items()))
    title = f"{len(same)} settings that all have in common"
    return f'<details class="shared"><summary>{title}</summary><dl class="facts">{pairs}</dl></details>' if same else ""
