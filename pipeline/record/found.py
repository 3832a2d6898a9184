"""What is known of a result: what decides it, what it is, and where it lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np

EARLIER = "results.json"
"""Where earlier programs kept all results of a folder."""
Cell = str | int | float | None


@dataclass(frozen=True)
class Origin:
    """What decides a result: those of equal origin are the same, and those of unlike ones are not compared."""

    model: str
    """What was measured, as a person calls it: "step 400", "random init"; no part of the identity."""
    step: int | None
    """The checkpoint's step; None for a model that is not one of the run's checkpoints; no part of the identity."""
    weights: str
    """Hash of what was measured."""
    evaluation: str
    settings: Mapping[str, Any]
    """Of the evaluation, its images and its judge; no names of streams, and no seed."""
    data: Mapping[str, str]
    """What a data set was used for ("train", "test") to the fingerprint of its manifest."""
    seed: int | None = None
    version: int = 1
    """Of the evaluation's protocol."""

    @property
    def name(self) -> str:
        """Of its record and its folder, "knn-0f3a...": the same when the same is measured again."""
        identity = {key: value for key, value in vars(self).items() if key not in ("model", "step")}
        mark = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        return f"{self.evaluation}-{mark}"

    @property
    def config(self) -> str:
        """Fingerprint of the settings."""
        return hashlib.sha256(json.dumps(dict(self.settings), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Found:
    """One result, and all that is needed to know what it means."""

    model: str
    """See :class:`Origin`."""
    step: int | None
    evaluation: str
    metric: str
    """Name of the number, the table or the figure."""
    split: str
    config: str
    """Fingerprint of the settings."""
    manifests: dict[str, str]
    """``Origin.data``; in the first version, of all streams by their names."""
    time: str
    weights: str = ""
    """Empty in the first version."""
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    seed: int | None = None
    version: int = 1
    """Of the evaluation's protocol."""
    subject: str = ""
    """What was named to be evaluated: a run, a file; empty where that is not known."""
    data_name: str = ""
    """How the suite calls the set of streams that it was measured on; empty where there is one alone."""
    data_names: dict[str, str] = field(default_factory=dict[str, str])
    """What a data set was used for to its folder."""
    group: str = ""
    """Of an average over several results: the group's name."""
    record: str = EARLIER
    """The file in the folder of the results that holds it."""

    @property
    def limit(self) -> int | None:
        """Samples of each stream that were looked at; None: all."""
        return self.settings.get("limit")

    @property
    def task(self) -> tuple[object, ...]:
        """All that decides the result but the model and the seed."""
        data = tuple(sorted(self.manifests.items()))
        return (self.evaluation, self.version, self.metric, self.split, self.config, data)

    @property
    def what(self) -> tuple[object, ...]:
        """All that decides the result but the model: rows of a line have it in common."""
        return (*self.task, self.seed)

    @property
    def key(self) -> tuple[object, ...]:
        """A newer result replaces an older one of the same key and kind."""
        return (self.weights or self.model, *self.what)


@dataclass(frozen=True)
class Kept:
    """Where outcomes of a number's samples lie; :func:`pipeline.record.records.outcomes` reads them."""

    file: Path
    sha256: str
    values: str
    """Name in the file; ``n`` of the row tells how many there are."""
    sources: str | None
    """Name in the file of the sample's sources; None: each is its own."""


class Outcomes(NamedTuple):
    """What each sample adds to a number; see :class:`pipeline.core.evaluation.Number`."""

    values: np.ndarray
    """bool or float32[n], in the order of the stream."""
    sources: np.ndarray | None = None
    """int64[n]; None: no two samples share one."""


@dataclass(frozen=True, kw_only=True)
class Row(Found):
    """One number."""

    value: float
    n: int
    stderr: float | None
    better: Literal["higher", "lower"] | None
    outcomes: Kept | None = None
    """Of each sample; None: not kept, or the number is no mean over samples."""

    @property
    def is_fact(self) -> bool:
        """It tells how it was measured, such as a setting that was found, and not how good a model is."""
        return self.better is None and self.stderr is None and self.outcomes is None

    def replaces(self, other: Row) -> bool:
        """Whether ``other`` is an older form of this number: one of the first version, known by names alone."""
        names = [(r.model, r.evaluation, r.metric, r.split) for r in (self, other)]
        return not other.weights and bool(self.weights) and names[0] == names[1]


@dataclass(frozen=True, kw_only=True)
class KeptTable(Found):
    """One table."""

    columns: list[str]
    rows: list[list[Cell]]
    """What is not finite is a text in the file, and stays one when it is read."""


@dataclass(frozen=True, kw_only=True)
class KeptFigure(Found):
    """One picture."""

    caption: str
    file: str
    """Where it lies in the folder of the results."""


class Failed(NamedTuple):
    """An evaluation of a model that has failed."""

    task: str
    """As the suite calls it."""
    model: str
    text: str
    """Why, in words."""
    time: str


class Results(NamedTuple):
    """All of a folder, each kind in the order in which they first came."""

    rows: list[Row]
    tables: list[KeptTable]
    figures: list[KeptFigure]
    damaged: tuple[str, ...] = ()
    """A sentence for each file that cannot be read; what it held is evaluated anew when it is asked for."""
    failed: tuple[Failed, ...] = ()

    def and_of(self, more: Results) -> Results:
        """Both."""
        rows, tables, figures = self.rows + more.rows, self.tables + more.tables, self.figures + more.figures
        return Results(rows, tables, figures, self.damaged + more.damaged, self.failed + more.failed)
