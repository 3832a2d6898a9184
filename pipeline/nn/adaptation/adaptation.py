"""What objectives of domain adaptation have in common: labelled sources, a target, batch norm over one or over both.

Which scenario it is decides the data: several sources in ``data.train``; ``[data.beside.labelled]``, a few samples of
the target with labels; several targets, one after the other, for one that changes gradually.
Shape letters: B samples, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from pipeline.config.strict import Text
from pipeline.core.batch import batch_of
from pipeline.core.classes import class_name
from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, DataFacts, StepContext
from pipeline.nn.adaptation.classifier import ClassifierConfig, Classifying, blocks_of
from pipeline.nn.adaptation.sources import check_sources, domain_of
from pipeline.nn.adaptation.statistics import SourceStatistics, norms_of
from pipeline.nn.dropout import dropping_for
from pipeline.nn.labels import check_labels
from pipeline.nn.teacher import Seen

LABELLED = "labelled"
"""The data set beside the first with samples of the target that have labels."""


class AdaptationConfig(ClassifierConfig):
    """Settings of adaptation."""

    targets: Annotated[tuple[Text, ...], Field(min_length=1)] = ("target",)
    """Data sets ``[data.beside.NAME]`` that are adapted to, each for an equal part of the run, in this order."""
    batch_norm: Literal["joint", "domain"] = "joint"
    """Whose statistics batch norm takes: those of source and target together; or each domain's own, of which the model
    keeps the target's."""
    per_source: bool = False
    """Hold each source's domain against the target by itself, and not all of them together."""


class Domains(NamedTuple):
    """A batch, and what the model makes of it."""

    source: Seen
    target: Seen
    label: Tensor
    """int64[B], of the source."""
    source_batch: Batch
    target_batch: Batch


class Adaptation(Classifying):
    """Cross-entropy on the source, and on labelled samples of the target, and something that holds domains together."""

    numbers: Tensor

    def __init__(self, config: AdaptationConfig, facts: DataFacts, name: str) -> None:
        super().__init__(config, facts, name)
        self.settings = config
        strange = [target for target in config.targets if target not in facts.beside]
        if strange:
            there = ", ".join(facts.beside) or "none"
            raise ConfigError(
                f"objective {name!r} adapts to the data set {strange[0]!r} beside the first (there: {there}); add "
                f"[data.beside.{strange[0]}], or name another in objective.targets"
            )
        if config.per_source:
            check_sources(facts, "objective.per_source")
        self.needs = {**self.needs, **{f"{target}_image": self.image_spec for target in config.targets}}
        if LABELLED in facts.beside:
            self.needs = {**self.needs, f"{LABELLED}_image": self.image_spec, f"{LABELLED}_label": "int64[B]"}
            self.register_buffer("numbers", _numbers(facts), persistent=False)
        self.statistics = None
        if config.batch_norm == "domain":
            self.statistics = SourceStatistics(self)
            if not norms_of(self):
                raise ConfigError(
                    f'objective.batch_norm = "domain": {config.encoder!r} has no batch norm; leave it out'
                )
        self._labelled_checked = False

    def target_at(self, progress: float) -> str:
        """The data set that is adapted to at a part of the run, 0 to 1."""
        names = self.settings.targets
        return names[min(int(progress * len(names)), len(names) - 1)]

    def domain_of(self, batch: Batch) -> Tensor:
        """int64[B], number of each source sample's domain in ``facts.domains``."""
        return domain_of(batch["id"], self.facts)

    def target_image(self, batch: Batch, ctx: StepContext) -> Tensor:
        """The target's images as the encoder is given them, normalised, float32[B,C,H,W]."""
        return self.encoder.normalize(batch["image"])

    def embed(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """See :class:`Classifying`, with what :meth:`compared` adds."""
        source, target = batch_of(batch), batch_of(batch, self.target_at(ctx.clock.progress))
        parts = [(source, self.encoder.normalize(source["image"])), (target, self.target_image(target, ctx))]
        if LABELLED in self.facts.beside:
            few = batch_of(batch, LABELLED)
            parts.append((few, self.encoder.normalize(few["image"])))
        seen = self._encoded(parts, ctx)
        domains = Domains(seen[0], seen[1], self.labels_of(source), source, target)
        rows = self.classified(seen[0].features, answers_of(seen[0]), domains.label)
        rows |= self.compared(domains, ctx)
        if len(parts) > 2:
            rows["classification"] = rows["classification"] + self._of_few(seen[2], parts[2][0])
        return rows

    @abstractmethod
    def compared(self, domains: Domains, ctx: StepContext) -> dict[str, Tensor]:
        """Rows for :meth:`beside`, and "classification" where it is to be another."""

    def read(self) -> Sequence[str]:
        """Layers that are read beside features and logits."""
        return ()

    def _encoded(self, parts: list[tuple[Batch, Tensor]], ctx: StepContext) -> list[Seen]:
        """All data sets of a batch: in one forward, or each domain in one of its own, the source first."""
        if self.statistics is None:
            return self._forward(parts, ctx)
        with self.statistics.within(self):
            source = self._forward(parts[:1], ctx)
        return source + self._forward(parts[1:], ctx)

    def _forward(self, parts: list[tuple[Batch, Tensor]], ctx: StepContext) -> list[Seen]:
        together = {name: torch.cat([batch[name] for batch, _ in parts]) for name in ("id", "epoch")}
        with dropping_for(together, ctx):
            whole = self.answer(torch.cat([x for _, x in parts]), blocks_of(self.read()))
        sizes = [len(x) for _, x in parts]
        maps = {name: x.split(sizes) for name, x in whole.blocks.items()}
        return [
            Seen(features, logits, {name: pieces[i] for name, pieces in maps.items()})
            for i, (features, logits) in enumerate(
                zip(whole.features.split(sizes), answers_of(whole).split(sizes), strict=True)
            )
        ]

    def _of_few(self, seen: Seen, batch: Batch) -> Tensor:
        """Cross-entropy of the target's labelled samples, float32[B]."""
        if not self._labelled_checked:
            check_labels(batch["label"], self.facts.beside[LABELLED].classes)
            self._labelled_checked = True
        return self.cross_entropy(answers_of(seen), self.numbers[batch["label"]])


def answers_of(seen: Seen) -> Tensor:
    """The logits of what has a classifier, float32[B,K]."""
    assert seen.logits is not None
    return seen.logits


def _numbers(facts: DataFacts) -> Tensor:
    """int64[classes of the labelled target], their numbers among the source's.

    Raises:
        ConfigError: one has no name there.
    """
    there = {class_name(name): number for number, name in enumerate(facts.classes)}
    few = facts.beside[LABELLED].classes
    strange = [name for name in few if class_name(name) not in there]
    if strange or not few:
        said = f"has the class {strange[0]!r}, which data.train has not" if strange else "has no classes"
        raise ConfigError(
            f"data.beside.{LABELLED} {said}; build it with the same list: sluice prep build ... --classes SHARDS"
        )
    return torch.tensor([there[class_name(name)] for name in few])
