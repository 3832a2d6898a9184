"""Results of models as Markdown, CSV and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.record.files import dumps
from pipeline.record.grids import csv_text, markdown
from pipeline.record.judging import leading
from pipeline.record.lines import Line, Score, lines, models
from pipeline.record.results import Results


def results_markdown(results: Results) -> str:
    """Metrics as rows, models as columns; bold is the best and what is not significantly worse."""
    names = models(results.rows)
    rows = []
    for line in lines(results.rows):
        marks = leading(line) if len(names) > 1 else [""] * len(names)
        texts = [f"**{text}**" if mark else text for text, mark in zip(line.texts(), marks, strict=True)]
        rows.append([line.name, line.data, str(line.measured[0].n), *(text.replace("+-", "\u00b1") for text in texts)])
    return markdown(["metric", "data", "n", *names], rows, left=2)


def _plain(name: str, line: Line, score: Score, mark: str) -> dict[str, Any]:
    row = score.rows[0]
    return {
        "model": name,
        "step": row.step,
        "weights": row.weights,
        "evaluation": row.evaluation,
        "metric": row.metric,
        "data": line.data,
        "split": row.split,
        "value": score.value,
        "stderr": score.stderr,
        "n": row.n,
        "seeds": [one for one in score.seeds if one is not None],
        "better": row.better,
        "mark": mark,
        "settings": row.settings,
        "manifests": row.manifests,
        "version": row.version,
        "time": row.time,
    }


def _all(results: Results) -> Sequence[dict[str, Any]]:
    names = models(results.rows)
    found = []
    for line in lines(results.rows):
        marks = leading(line) if len(names) > 1 else [""] * len(names)
        for name, score, mark in zip(names, line.cells, marks, strict=True):
            if score is not None:
                found.append(_plain(name, line, score, mark))
    return found


def results_csv(results: Results) -> str:
    """A line for each number, with all digits; settings and data as JSON."""
    rows = [
        {key: dumps(value) if isinstance(value, dict | list) else value for key, value in one.items()}
        for one in _all(results)
    ]
    return csv_text(list(rows[0]), [list(row.values()) for row in rows])


def results_json(results: Results) -> str:
    """All numbers and tables, and where pictures lie."""
    found = {
        "numbers": _all(results),
        "tables": [{k: getattr(t, k) for k in ("model", "metric", "split", "columns", "rows")} for t in results.tables],
        "figures": [
            {k: getattr(f, k) for k in ("model", "metric", "split", "caption", "file")} for f in results.figures
        ],
        "failed": [one._asdict() for one in results.failed],
        "damaged": list(results.damaged),
    }
    return dumps(found, indent=1) + "\n"
