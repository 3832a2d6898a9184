"""The typed configuration of a part of a data set: which of its samples there are. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config.strict import Positive, Strict, Text

Seed = Annotated[int, Field(ge=0, lt=1 << 63)]


def _as_tuple(given: object) -> object:
    """Behind the validator of a suite's stream values are not JSON to pydantic any more, and strict about lists."""
    return tuple(cast("list[object]", given)) if isinstance(given, list) else given


Classes = Annotated[tuple[Text, ...], BeforeValidator(_as_tuple)]


class HeldOut(Strict):
    """A split by a hash of the key: the two parts never meet, wherever and in whatever order the samples are read.

    The same ``share`` and ``seed`` make the same two parts. What is added to the data set later moves no sample.
    """

    part: Literal["held_out", "rest"]
    """The samples that are held out, or all others."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """That is held out, of any sufficiently large number of samples; larger shares hold the smaller ones."""
    seed: Seed = 0

    def __str__(self) -> str:
        """For people, and for the state of a stream."""
        return f"{self.part} of {self.share}, seed {self.seed}"


class ByLabel(Strict):
    """Few labels, or fewer classes: samples drawn by a hash of the key, of what the other rules leave.

    Fewer samples are among more: 5 of each class hold those of 1 of each class with the same seed.
    """

    per_class: Positive | None = None
    """Samples of each class."""
    samples: Positive | None = None
    """Samples in all, of whatever classes they are."""
    classes: Classes = ()
    """Names of the classes that there are; left out: all of the data set. Their numbers stay what they are."""
    without: Classes = ()
    """Names of classes that are left out."""
    seed: Seed = 0

    @model_validator(mode="after")
    def _says_something(self) -> ByLabel:
        if self.per_class and self.samples:
            raise ValueError("'per_class' and 'samples' both say how many samples there are; remove one")
        if self.classes and self.without:
            raise ValueError("'classes' and 'without' both say which classes there are; remove one")
        if not (self.per_class or self.samples or self.classes or self.without):
            raise ValueError("nothing is chosen: set per_class, samples, classes or without")
        return self

    def __str__(self) -> str:
        """For people, and for the state of a stream."""
        parts: list[str] = []
        if self.per_class or self.samples:
            number = f"{self.per_class} per class" if self.per_class else f"{self.samples} samples"
            parts = [number, f"seed {self.seed}"]
        parts += [
            f"{word} {', '.join(named)}" for word, named in (("of", self.classes), ("without", self.without)) if named
        ]
        return ", ".join(parts)


class Choice(Strict):
    """Samples that all rules keep: ``keep`` first, then ``where``, then ``held_out``; ``by_label`` draws of these."""

    keep: Text | None = None
    """A file that lists the samples, one a line: their keys, or their numbers in the data set."""
    where: Text | None = None
    """A condition on their metadata that samples must meet: 'score > 0.3 and lang in ("en", "de")'; a sidecar's number
    stands in backticks: '`scores:score` > 0.3'."""
    held_out: HeldOut | None = None
    """One of the two parts of a split by key: ``{part = "rest", share = 0.1}`` to train on, ``{part = "held_out", share
    = 0.1}`` of the same data set to choose by."""
    by_label: ByLabel | None = None
    """So many samples of each class, or some of the classes alone: ``{per_class = 5, seed = 0}``."""

    @property
    def rules(self) -> dict[str, Any]:
        """Those that are set, by name."""
        return {name: rule for name in Choice.model_fields if (rule := getattr(self, name))}
