"""What an evaluation is given: encoders, streams, features, training, and a folder of its own."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from pipeline.config.schema import EvalData, Training
from pipeline.core.errors import ConfigError
from pipeline.core.evaluation import OWN, EvalStream, Features, Reading
from pipeline.core.protocols import Batch, Objective
from pipeline.dist.group import Place
from pipeline.suites.feature_store import FeatureStore, Source
from pipeline.suites.training import train_on

T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    """Of one subject and suite; see :class:`pipeline.core.evaluation.EvalContext`."""

    encoders: Mapping[str, nn.Module]
    classes: Mapping[str, tuple[str, ...]]
    streams: Mapping[str, EvalStream]
    place: Place
    folder: Path
    data: Mapping[str, EvalData | str] = field(default_factory=dict)
    """Stream to its shards, or the part of them that it is."""
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Stream to all that decides what its batches hold; what is extracted from one without is not kept on disk."""
    store: FeatureStore = field(default_factory=FeatureStore)
    """Of all features of the subject."""
    tokenize: Callable[[Sequence[str]], Batch] | None = None
    """What turns texts into what the encoder "text" takes; None: the model was trained without texts."""
    spell: Callable[[Batch], list[str]] | None = None
    """The other way round."""
    show: Callable[[str, int, int], None] = lambda what, done, total: None
    """For progress: so many of all samples of something are done."""
    kept: dict[Hashable, Any] = field(default_factory=dict)
    """What several evaluations need is made once: encoders must not change meanwhile."""

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` gives, or gave before under the same ``key``."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def features(
        self, encoder: str, stream: str, fields: Sequence[str] = ("label",), module: nn.Module | None = None
    ) -> Features:
        """Features of every sample of a stream; made once for all evaluations that ask for the same."""
        source = Source(stream, self.streams[stream], self.facts.get(stream))
        return self.store.get(encoder, module or self.encoders[encoder], source, (OWN,), fields)[OWN]

    def readings(
        self, encoder: str, stream: str, readings: Sequence[Reading], fields: Sequence[str] = ("label",)
    ) -> dict[Reading, Features]:
        """Several readings of an encoder of images from one pass over a stream."""
        source = Source(stream, self.streams[stream], self.facts.get(stream))
        return self.store.get(encoder, self.encoders[encoder], source, readings, fields)

    def tokens(self, texts: Sequence[str]) -> Batch:
        """Any texts as the encoder "text" takes them."""
        if self.tokenize is None:
            raise ConfigError("this evaluation reads texts, and the model was trained without any, so it has no words")
        return self.tokenize(texts)

    def words(self, text: Batch) -> list[str]:
        """Texts as a person reads them."""
        if self.spell is None:
            raise ConfigError("this evaluation reads texts, and the model was trained without any, so it has no words")
        return self.spell(text)

    def train(self, objective: Objective, data: str | Path, training: Training) -> None:
        """Train an objective on a stream's data, or on those of a folder."""
        folder = self.data[data] if isinstance(data, str) else str(data)
        with torch.enable_grad(), torch.random.fork_rng():
            train_on(objective, folder, training, self.place, self.folder)
