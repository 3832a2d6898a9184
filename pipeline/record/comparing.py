"""Two models or more against the first of them: what is measured alike is compared, of the rest it is said why not."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.core.errors import ConfigError
from pipeline.record import statistics
from pipeline.record.judging import judge
from pipeline.record.lines import Score, apart, facts_of, score, short_fact
from pipeline.record.results import CHECKPOINT, Found, Row, read_results, run_names, run_of
from pipeline.record.runs import config_differences
from pipeline.record.statistics import Difference


class Subject(NamedTuple):
    """A model with all that was measured of it."""

    name: str
    rows: list[Row]
    folder: str | None = None
    """Of its run; None: it is not known."""


class Compared(NamedTuple):
    """A number of two models, measured alike."""

    metric: str
    """Told apart from others of its name."""
    data: str
    against: str
    """Name of the first subject."""
    subject: str
    """Name of the other."""
    first: Score
    second: Score
    difference: Difference
    p: float
    """After Holm's correction for all that are compared."""

    @property
    def verdict(self) -> str:
        """In a word or two."""
        if math.isnan(self.p):
            return "unknown"
        if self.p >= 1 - statistics.LEVEL:
            return "not shown"
        if self.first.better is None:
            return "differs"
        return "better" if (self.difference.value > 0) == (self.first.better == "higher") else "worse"


class Unlike(NamedTuple):
    """A number that is not compared."""

    metric: str
    data: str
    subject: str
    """Of the others."""
    why: str


class Comparison(NamedTuple):
    """All of it."""

    subjects: list[str]
    """The first one is what the others are compared with."""
    compared: list[Compared]
    unlike: list[Unlike]
    settings: Mapping[str, tuple[Any, ...]] = {}
    """Settings of the runs that differ, in the order of the subjects."""


def compare(subjects: Sequence[Subject]) -> Comparison:
    """Compare all subjects but the first with the first."""
    first, *others = subjects
    known = {one.name: _by_task(one.rows) for one in subjects}
    titles = _titles([row for one in subjects for row in one.rows])
    compared, unlike = [], []
    for other in others:
        a, b = known[first.name], known[other.name]
        alike = [task for task in a if task in b and a[task].keys() & b[task].keys()]
        for task in alike:
            seeds = [seed for seed in a[task] if seed in b[task]]
            one, two = (score([rows[task][seed] for seed in seeds]) for rows in (a, b))
            row = one.rows[0]
            data = row.data_name or row.split
            if row.is_fact:
                if one.value != two.value:
                    unlike.append(
                        Unlike(
                            titles[task],
                            data,
                            other.name,
                            f"it tells how it was measured: {one.value:g} and {two.value:g}",
                        )
                    )
                continue
            compared.append(Compared(titles[task], data, first.name, other.name, one, two, judge(one, two), math.nan))
        left = [[_any(rows[task]) for task in rows if task not in alike] for rows in (a, b)]
        unlike += _unlike(first.name, other.name, *left)
    corrected = statistics.holm([one.difference.p for one in compared])
    compared = [one._replace(p=p) for one, p in zip(compared, corrected, strict=True)]
    folders = [one.folder for one in subjects if one.folder is not None]
    settings = config_differences(folders) if len(folders) == len(subjects) else {}
    return Comparison([one.name for one in subjects], compared, unlike, settings)


def _by_task(rows: Sequence[Row]) -> dict[tuple[object, ...], dict[int | None, Row]]:
    """What was measured, and with which seeds."""
    found: dict[tuple[object, ...], dict[int | None, Row]] = {}
    for row in rows:
        found.setdefault(row.task, {})[row.seed] = row
    return {task: dict(sorted(of.items(), key=lambda one: (one[0] is not None, one[0]))) for task, of in found.items()}


def _any(of_seeds: dict[int | None, Row]) -> Row:
    return next(iter(of_seeds.values()))


def _titles(rows: Sequence[Row]) -> dict[tuple[object, ...], str]:
    """Of each task the name of its metric, told apart from others of that name."""
    groups: dict[tuple[str, str, str], dict[tuple[object, ...], Row]] = {}
    for row in rows:
        groups.setdefault((row.evaluation, row.metric, row.split), {}).setdefault(row.task, replace(row, seed=None))
    titles = {}
    for group in groups.values():
        for (task, row), fact in zip(group.items(), apart(list(group.values())), strict=True):
            titles[task] = f"{row.metric} [{fact}]" if fact else row.metric
    return titles


def _unlike(first: str, other: str, own: Sequence[Row], theirs: Sequence[Row]) -> list[Unlike]:
    """Why metrics that at least one of the two has are not compared, one sentence each."""
    # Of data sets that a suite calls by name, those of one name are held against each other.
    metrics = dict.fromkeys((row.evaluation, row.metric, row.data_name) for row in [*own, *theirs])
    found: list[Unlike] = []
    for metric in metrics:
        a, b = ([r for r in rows if (r.evaluation, r.metric, r.data_name) == metric] for rows in (own, theirs))
        row = (a or b)[0]
        if a and b:
            why = "; ".join(min((_differences(one, another) for one in a for another in b), key=len))
        else:
            why = f"only {first if a else other} has it"
        found.append(Unlike(row.metric, row.data_name or row.split, other, why))
    return found


def _differences(first: Found, second: Found) -> list[str]:
    """In what two results of one metric differ, in words."""
    a, b = ({"stream": row.split} | facts_of(row) for row in (first, second))
    return [
        f"{key}: {_fact(key, a, first)} and {_fact(key, b, second)}"
        for key in dict.fromkeys([*a, *b])
        if a.get(key) != b.get(key)
    ]


def _fact(key: str, facts: dict[str, Any], row: Found) -> str:
    """A setting's value; of data, where it lies too."""
    folder = row.data_names.get(key.removesuffix(" data"), "")
    value = short_fact(facts[key]) if facts.get(key) is not None else "none"
    return f"{value} ({folder})" if folder else value


def subjects_of(words: Sequence[str]) -> list[Subject]:
    """What was named on the command line.

    Args:
        words: a run or a folder of results (its newest checkpoint, or its only model), ``FOLDER@MODEL`` (a step, the
            name of a model as the report has it, or "all"), a checkpoint's folder; or, after a folder, names of models
            in it.

    Raises:
        ConfigError: nothing of that name, or fewer than two models.
    """
    named: list[tuple[str, str]] = []  # folder and model, "" for the newest
    for number, word in enumerate(words):
        folder, model = _split(word)
        if folder is not None:
            named.append((folder, model))
        elif named:
            if number and named[-1][1] == "" and _split(words[number - 1])[0] is not None:
                named.pop()  # "FOLDER MODEL MODEL": the folder itself is no subject
                named.append((str(_split(words[number - 1])[0]), word))
            else:
                named.append((named[-1][0], word))
        else:
            raise ConfigError(f"{word} is no folder of results; name a run first, then models in it, or RUN@MODEL")
    return _chosen(named)


def _split(word: str) -> tuple[str | None, str]:
    """Folder and model that a word names; no folder where it names none."""
    folder, _, model = (word, "", "") if Path(word).is_dir() else word.rpartition("@")
    if not folder or not Path(folder).is_dir():
        return None, word
    run = run_of(folder)
    if run != folder:
        return run, str(json.loads((Path(folder) / CHECKPOINT).read_text(encoding="utf-8"))["step"])
    return folder, model


def _chosen(named: Sequence[tuple[str, str]]) -> list[Subject]:
    names = run_names(folder for folder, _ in named)
    results = {folder: read_results(folder) for folder in names}
    found: dict[tuple[str, str], tuple[str, str, str, list[Row]]] = {}
    alike = {Path(folder).resolve(): folder for folder in names}
    for folder, model in named:
        folder = alike[Path(folder).resolve()]
        rows = results[folder].rows
        if not rows:
            raise ConfigError(f"{folder} has no results; evaluate it first: sluice eval {folder} SUITE")
        for name in _models(folder, model, rows):
            found[folder, name] = (folder, names[folder], name, _of(name, rows))
    if len(found) < 2:
        (folder, name), *_ = found
        others = ", ".join(repr(m) for m in dict.fromkeys(r.model for r in results[folder].rows) if m != name)
        more = f'; in {folder} there are also {others}: sluice compare {folder} "{name}" MODEL' if others else ""
        raise ConfigError(f"only {name!r} of {folder} is named, and two are needed to compare{more}")
    several = len({run for _, run, _, _ in found.values()}) > 1
    return [Subject(f"{run}: {name}" if several else name, rows, at) for at, run, name, rows in found.values()]


def _models(folder: str, wanted: str, rows: Sequence[Row]) -> list[str]:
    """Names of the models of a folder that are meant."""
    steps = {row.model: row.step for row in rows}
    if wanted == "all":
        return list(steps)
    if wanted in steps:
        return [wanted]
    newest = max((step for step in steps.values() if step is not None), default=None)
    found = [model for model, step in steps.items() if str(step) == (wanted or str(newest))]
    if len(found) == 1:
        return found
    known = ", ".join(map(repr, steps))
    if wanted and not found:
        raise ConfigError(f"{folder} has no model {wanted!r}; there are {known}")
    raise ConfigError(f"{folder} holds {known}: say which, {folder}@MODEL, or {folder}@all")


def _of(model: str, rows: Sequence[Row]) -> list[Row]:
    """Rows of a model; where several weights had its name, of those that were measured last."""
    own = [row for row in rows if row.model == model]
    newest = max(own, key=lambda row: row.time).weights
    return [row for row in own if row.weights == newest]
