"""A comparison as text for terminals, Markdown, CSV and JSON."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from pipeline.record.comparing import Compared, Comparison, Unlike
from pipeline.record.files import dumps
from pipeline.record.formats import decimals, far_apart, short, with_error
from pipeline.record.grids import csv_text, markdown
from pipeline.record.terminal import print_table

_STYLES = {"better": "bold green", "worse": "bold red", "differs": "bold"}
_HEAD = ("metric", "data", "difference", "95 % interval", "p", "shown", "smallest", "how")


def comparison_text(comparison: Comparison) -> str:
    """Tables, one for each subject that is compared with the first, and a sentence for what is not compared."""
    text, terminal = io.StringIO(), sys.stdout.isatty()
    first = comparison.subjects[0]
    for subject in comparison.subjects[1:]:
        own = [one for one in comparison.compared if one.subject == subject]
        if own:
            print_table(_table(first, subject, own), text, terminal)
    return "\n".join([text.getvalue().rstrip("\n"), "", *_how(comparison), *_notes(comparison)]).strip("\n")


def _table(first: str, subject: str, own: list[Compared]) -> Table:
    """Narrow enough for a terminal: the errors of both values are in the interval, the methods below."""
    shown = Table(title=Text(f"{subject} against {first}"), box=box.SIMPLE_HEAD, pad_edge=False)
    several = len({one.data for one in own}) > 1
    for name in ["metric", *(["data"] if several else [])]:
        shown.add_column(name, no_wrap=name == "metric")
    for name in (first, subject, *_HEAD[2:5], "shown", "smallest"):
        shown.add_column(Text(name), justify="left" if name == "shown" else "right", no_wrap=name in _HEAD)
    for one in own:
        metric, data, a, b, *rest, verdict, smallest, _ = _cells(one)
        values = [value.partition(" +- ")[0] for value in (a, b)]
        judged = Text(verdict, style=_STYLES.get(verdict, "dim"))
        cells = [metric, *([data] if several else []), *values, *rest]
        shown.add_row(*map(Text, cells), judged, Text(smallest))
    return shown


def _how(comparison: Comparison) -> list[str]:
    """Which method was used for what; one sentence for each."""
    used: dict[str, dict[str, None]] = {}
    for one in comparison.compared:
        used.setdefault(one.difference.method, {})[one.metric] = None
    return [f"{method}: {', '.join(metrics)}" for method, metrics in used.items()]


def _cells(one: Compared) -> list[str]:
    """Metric, data, both values, difference, interval, p, verdict, smallest difference, method."""
    d = one.difference
    wide = [] if math.isnan(d.low) else [(d.high - d.low) / 4]
    errors = [s.stderr for s in (one.first, one.second) if s.stderr is not None]
    places = decimals([one.first.value, one.second.value], [*errors, *wide])
    values = [with_error(s.value, s.stderr, places) for s in (one.first, one.second)]
    difference = f"{d.value:+.{places}f}"
    if far_apart([one.first.value, one.second.value], [*errors, *wide]):
        values = [short(s.value) for s in (one.first, one.second)]
        difference = "+" * (d.value >= 0) + short(d.value)
    interval = "" if math.isnan(d.low) else f"{d.low:+.{places}f} to {d.high:+.{places}f}"
    smallest = "" if math.isnan(d.smallest) else f"{d.smallest:.{places}f}"
    return [
        one.metric,
        one.data,
        *values,
        difference,
        interval,
        _p(one.p),
        one.verdict,
        smallest,
        d.method,
    ]


def _p(p: float) -> str:
    return "" if math.isnan(p) else "<0.0001" if p < 1e-4 else f"{p:.4f}"


def _notes(comparison: Comparison) -> list[str]:
    """What the table means, and what is not in it."""
    count = sum(not math.isnan(one.p) for one in comparison.compared)
    said: list[str] = []
    if comparison.compared:
        corrected = f"p after Holm's correction for {count} comparisons" if count > 1 else "p of one comparison"
        said.append(
            f"difference: minus {comparison.subjects[0]}; {corrected}; shown at 5 %; smallest: the difference that so "
            "many samples show in four of five cases"
        )
    else:
        said.append("nothing was measured alike")
    several = len({one.data for one in [*comparison.compared, *comparison.unlike]}) > 1
    for setting, values in comparison.settings.items():
        said.append(f"setting {setting}: {', '.join(map(str, values))}")
    for reason, found in _by_reason(comparison.unlike).items():
        names = [f"{one.metric} on {one.data}" if several else one.metric for one in found]
        said.append(f"not compared: {', '.join(dict.fromkeys(names))}: {reason}")
    return said


def _by_reason(unlike: list[Unlike]) -> dict[str, list[Unlike]]:
    several = len({one.subject for one in unlike}) > 1
    groups: dict[str, list[Unlike]] = {}
    for one in unlike:
        alone = one.why.startswith("only ")
        groups.setdefault(f"{one.why} ({one.subject})" if several and not alone else one.why, []).append(one)
    return groups


def comparison_markdown(comparison: Comparison) -> str:
    """All comparisons in one table."""
    head = ("metric", "data", "first", "second", *_HEAD[2:])
    rows = [_cells(one) for one in comparison.compared]
    if len(comparison.subjects) > 2:
        head, rows = (
            ("against", *head),
            [[one.subject, *row] for one, row in zip(comparison.compared, rows, strict=True)],
        )
    names = f"first: {comparison.subjects[0]}; second: {', '.join(comparison.subjects[1:])}"
    return (
        "\n".join([markdown(head, rows, left=len(head) - 8), *(f"- {note}" for note in (names, *_notes(comparison)))])
        + "\n"
    )


def _plain(one: Compared) -> dict[str, Any]:
    d = one.difference
    return {
        "metric": one.metric,
        "data": one.data,
        "split": one.first.rows[0].split,
        "evaluation": one.first.rows[0].evaluation,
        "first": one.against,
        "second": one.subject,
        "first_value": one.first.value,
        "first_stderr": one.first.stderr,
        "second_value": one.second.value,
        "second_stderr": one.second.stderr,
        "n": one.first.n,
        "seeds": len(one.first.rows),
        "difference": d.value,
        "low": d.low,
        "high": d.high,
        "p": d.p,
        "p_corrected": one.p,
        "verdict": one.verdict,
        "smallest": d.smallest,
        "method": d.method,
    }


def comparison_csv(comparison: Comparison) -> str:
    """A line for each comparison, with all digits."""
    rows = [_plain(one) for one in comparison.compared]
    head = list(rows[0]) if rows else ["metric"]
    return csv_text(head, [list(row.values()) for row in rows])


def comparison_json(comparison: Comparison) -> str:
    """All of it, also what is not compared."""
    body = {
        "subjects": comparison.subjects,
        "settings": {name: list(values) for name, values in comparison.settings.items()},
        "compared": [_plain(one) for one in comparison.compared],
        "not_compared": [one._asdict() for one in comparison.unlike],
    }
    return dumps(body, indent=1) + "\n"


FORMATS: Mapping[str, Callable[[Comparison], str]] = {
    "text": comparison_text,
    "md": comparison_markdown,
    "csv": comparison_csv,
    "json": comparison_json,
}
"""By the name of the option."""
