"""Results as CLIP_benchmark has them: a JSON file for each data set, model and task; its ``build`` takes the folder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import NamedTuple

from pipeline.record.files import dumps
from pipeline.record.results import Results, Row

_TASKS = {
    "zero_shot": ("zeroshot_classification", ""),
    "retrieval": ("zeroshot_retrieval", ""),
    "linear_probe": ("linear_probe", "lp_"),
    "logistic_regression": ("linear_probe", "lp_"),
}
"""Evaluation to the name of its task there, and what stands before the names of its metrics."""
_METRICS = (
    (r"retrieval/top(\d+)_(image|text)", r"\2_retrieval_recall@\1"),
    (r"\w+/top(1|5)", r"acc\1"),
    (r"\w+/mean_(per_)?class_recall", "mean_per_class_recall"),
    (r"\w+/mAP", "mean_average_precision"),
)
"""Names of metrics, and what they are called there."""


class Model(NamedTuple):
    """A model in two words: "mae" and "step 400"."""

    run: str
    weights: str


def metric_name(row: Row) -> str | None:
    """What CLIP_benchmark and DataComp call a metric, without "lp_"; None where they have no such."""
    for pattern, name in _METRICS:
        if found := re.fullmatch(pattern, row.metric):
            return found.expand(name)
    return None


def data_name(row: Row) -> str:
    """What a number was measured on: the suite's name, else the folder's, else the stream's."""
    folder = next((row.data_names[use] for use in ("test", "val") if use in row.data_names), "")
    return row.data_name or PurePath(folder.rstrip("/")).name or row.split


def by_model(runs: Sequence[tuple[str, Results]]) -> dict[Model, list[Row]]:
    """The rows of each model; results of several runs in one folder call theirs "RUN: MODEL"."""
    found: dict[Model, list[Row]] = {}
    for run, results in runs:
        for row in results.rows:
            of, _, weights = row.model.rpartition(": ")
            found.setdefault(Model(of or run, weights), []).append(row)
    return found


def files(runs: Sequence[tuple[str, Results]]) -> Iterator[tuple[str, str]]:
    """Names and texts of the files.

    Of several settings or seeds of one task, each has a file; the name then ends with a mark of the settings.

    Args:
        runs: of each run its name and its results.
    """
    for model, rows in by_model(runs).items():
        groups: dict[tuple[str, str], dict[tuple[object, ...], list[Row]]] = {}
        for row in rows:
            if row.evaluation in _TASKS and metric_name(row) is not None:
                what = (row.config, row.evaluation, tuple(sorted(row.manifests.items())), row.seed, row.weights)
                groups.setdefault((data_name(row), _TASKS[row.evaluation][0]), {}).setdefault(what, []).append(row)
        for (data, task), of in groups.items():
            for number, measured in enumerate(of.values()):
                apart = f"_{number}" if len(of) > 1 else ""
                name = f"{data}_{model.weights}_{model.run}_en_{task}{apart}"
                yield f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}.json", _text(model, data, task, measured)


def _text(model: Model, data: str, task: str, rows: Sequence[Row]) -> str:
    metrics = {f"{_TASKS[row.evaluation][1]}{metric_name(row)}": row.value for row in rows}
    names = {"dataset": data, "model": model.run, "pretrained": model.weights, "task": task}
    return dumps({**names, "metrics": metrics, "language": "en"}) + "\n"
