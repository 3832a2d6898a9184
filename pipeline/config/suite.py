"""The typed configuration of an evaluation suite. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.data import EvalData, Image
from pipeline.config.strict import Component, Positive, Precision, Strict, Text, Weights

Streams = Annotated[dict[str, EvalData], Field(min_length=1)]
"""Name to data set, e.g. {train = "shards/train", val = {path = "shards/val", where = "score > 0.3"}}."""


class EvalTask(Component):
    """An evaluation, once or on each of several data sets."""

    on: tuple[Text, ...] = ()
    """Names of [data]; left out: [streams] if there are any, else all of [data]."""


class Average(Strict):
    """One number of several of the same model: ``[groups.NAME]``. Where one of them lacks, there is no average."""

    metrics: Annotated[tuple[Text, ...], Field(min_length=1)] | Annotated[dict[str, Text], Field(min_length=1)]
    """Patterns of metrics, "knn/top1_*", on every data set; or for each data set its own."""
    on: tuple[Text, ...] = ()
    """Data sets; left out: all that evaluations with such metrics run on."""
    average: Literal["macro", "micro"]
    """"macro": all data sets count the same; "micro": all samples do."""

    @model_validator(mode="after")
    def _once(self) -> Average:
        if self.on and isinstance(self.metrics, dict):
            raise ValueError("'metrics' names the data sets already; remove 'on'")
        return self


class SuiteConfig(Strict):
    """A suite of evaluations, run on any checkpoint whose encoders fit."""

    version: Positive = 1
    """One more whenever the suite measures something else; it stands in every record."""
    streams: dict[str, EvalData] = Field(default_factory=dict[str, EvalData])
    """See :data:`Streams`."""
    data: dict[str, Streams] = Field(default_factory=dict[str, dict[str, EvalData]])
    """Sets of streams, so that an evaluation runs on many: ``[data.cifar10]``."""
    groups: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")], Average] = Field(
        default_factory=dict[str, Average]
    )
    fields: tuple[str, ...] = ("image", "label")
    """Fields of the manifests that a batch holds."""
    field: dict[Text, Component] = Field(default_factory=dict[str, Component])
    """Settings of fields, as ``data.field`` of a run."""
    image: Image | None = None
    """Geometry for evaluation; left out: centre crop at the run's training size."""
    batch: Positive = 256
    """On each rank. Batches are the same at any number of ranks, so that their numbers are."""
    workers: Annotated[int, Field(ge=0)] = 2
    precision: Precision = "fp32"
    """In which features are extracted and kept: "bf16" is autocast over the same fp32 weights, as in training."""
    cache_gb: Annotated[float, Field(ge=0)] = 20
    """Most that kept features may take on disk, in the folder "features" of SLUICE_CACHE or ~/.cache/sluice; those that
    were not used for longest go. 0: none are kept."""
    weights: Weights = "model"
    """See [ema]."""
    judge: Text | None = None
    """Folder of another run, whose newest checkpoint judges images that this one makes."""
    evals: tuple[EvalTask, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _data_sets(self) -> SuiteConfig:
        if not self.streams and not self.data:
            raise ValueError(
                'streams: there is no data: name it in [streams] (train = "...", val = "...") or [data.NAME]'
            )
        asked = {f"evals[{place}].on": task.on for place, task in enumerate(self.evals)}
        for name, group in self.groups.items():
            own = isinstance(group.metrics, dict)
            asked[f"groups.{name}.{'metrics' if own else 'on'}"] = tuple(group.metrics) if own else group.on
        known = ", ".join(self.data) or "none"
        wrong = [f"{where}: no [data.{name}]" for where, on in asked.items() for name in on if name not in self.data]
        if wrong:
            raise ValueError(f"{'; '.join(wrong)} (there are: {known})")
        if twice := [where for where, on in asked.items() if len(set(on)) < len(on)]:
            raise ValueError(f"{twice[0]} names a data set twice")
        return self

    @model_validator(mode="after")
    def _settings_are_used(self) -> SuiteConfig:
        if unused := sorted(set(self.field) - set(self.fields)):
            raise ValueError(f"field.{unused[0]} sets a field that is not wanted; add {unused[0]!r} to fields")
        return self

    def sets(self, task: EvalTask) -> dict[str, dict[str, EvalData]]:
        """The data sets that a task runs on, by name; "": [streams]."""
        names = task.on or ([""] if self.streams else list(self.data))
        return {name: self.data[name] if name else self.streams for name in names}
