"""Attentive probes of the frozen patches of an encoder: a grid of learning rates and decays in one training.

For encoders that have nowhere to put what they know of a whole image, as masked autoencoders. The pooling is AIM's (see
``evals/_attentive.py``), the grid and its length those of V-JEPA 2 (``configs/eval`` of its code): 20 probes, 20 epochs
of random crops, AdamW, cosine to zero without warm-up. Patches of all images fit no memory, so that the encoder runs on
every batch. The probe is chosen on a tenth of the training stream, which none is trained on; the test stream is looked
at once.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.config.durations import Duration
from pipeline.config.schema import Component, Group, Image, Optimizer, Strict, Training
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.evaluation import EvalContext, Evaluation, Features, Number, Output, Table, Uses
from pipeline.evals._attentive import Attentive, AttentiveProbes
from pipeline.evals._classes import in_classes_of
from pipeline.evals._classified import classified
from pipeline.evals._probe import Rates, check_samples, held_out
from pipeline.evals._training import settled
from pipeline.nn.reading import offered, trunk

Decays = Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)]


class Config(Strict):
    """Settings of attentive probes."""

    train: str = "train"
    """Stream that is trained on."""
    test: str = "val"
    """Stream that is classified, in the geometry of the suite."""
    rates: Rates = (1e-4, 3e-4, 1e-3, 3e-3, 5e-3)
    """Learning rates, for a batch of 256: they are multiplied by ``batch`` / 256."""
    decays: Decays = (0.01, 0.1, 0.4, 0.8)
    """Weight decays; every rate is tried with every decay."""
    heads: Annotated[int, Field(ge=1)] | None = None
    """Of the attention; left out: 16, or as many of 8, 4, 2, 1 as divide the width."""
    queries: Annotated[int, Field(ge=1)] = 1
    """Learned queries; what they see is averaged."""
    length: Duration = Duration(20, "ep")
    batch: Annotated[int, Field(ge=1)] = 256
    """Samples per step, over all ranks."""
    precision: Literal["bf16", "fp32"] = "fp32"
    image: Image | None = None
    """Geometry of training; left out: random crops of the size of the suite's images."""
    workers: Annotated[int, Field(ge=0)] = 2
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @property
    def grid(self) -> list[tuple[float, float]]:
        """Learning rate and decay of each probe."""
        return [(rate, decay) for rate in sorted(self.rates) for decay in sorted(self.decays)]

    def training(self) -> Training:
        """Each probe is a group of parameters of its own."""
        most = max(self.rates)
        groups = [
            Group(prefix=f"probes.probes.{number}", lr=rate / most, weight_decay=decay)
            for number, (rate, decay) in enumerate(self.grid)
        ]
        training = Training(
            length=self.length,
            global_batch=self.batch,
            optimizer=Optimizer(lr=most, lr_scaling="linear", betas=(0.9, 0.999), groups=tuple(groups)),
            schedule=Component(name="cosine"),
            precision=self.precision,
            workers=self.workers,
            seed=self.seed,
        )
        return training if self.image is None else training.model_copy(update={"image": self.image})


class AttentiveProbing(Evaluation):
    """Reports "attentive_probe/top1", "top5" with at least five classes, the mean recall of the classes and the table
    of confusions, of the probe that was chosen.

    "attentive_probe/rate" and "decay" are its own, "rate_at_edge" and "decay_at_edge" are 1 where they are the first or
    last of several that were tried. The table "attentive_probe/probes" has all, with what they reached on the held-out
    part.
    """

    trains = True

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """What is trained on and what is classified."""
        return Uses({name: ("image", "label") for name in (self.config.train, self.config.test)})

    def check(self, ctx: EvalContext) -> None:
        """Patches to look at."""
        if not offered(ctx.encoders["image"]).blocks:
            raise ConfigError("attentive_probe: no blocks of this encoder can be read, so it has no patches to look at")

    def run(self, ctx: EvalContext) -> Iterator[Output]:
        """Train on all ranks, classify on all ranks.

        Raises:
            ConfigError: heads that do not divide the width.
            DataError: too little to train on, a test sample of a class that training lacks, or all probes diverged.
            Mistakes: the batch does not fit the data or the ranks.
            NonFiniteError: the loss is not finite.
        """
        config, encoder = self.config, ctx.encoders["image"]
        train, test = (ctx.features("image", name) for name in (config.train, config.test))
        test = in_classes_of(test, train.classes, config.test, f"stream {config.train!r}")
        check_samples(train, test, config.train, config.test)
        held, _ = held_out(len(train.x))
        training = settled(config.training(), ctx, config.test)
        width = trunk(encoder).backbone.num_features
        probes = AttentiveProbes(
            len(config.grid), width, len(train.classes), self.heads_of(width), config.queries, config.seed
        )
        mask = torch.zeros(len(train.x), dtype=torch.bool).index_fill_(0, held, True)
        objective = Attentive(encoder, probes, mask)
        ctx.train(objective, config.train, training)
        name = f"attentive_probe of {ctx.folder.name}"
        guessing = objective.guessing()
        trained, tested = (ctx.features(name, s, module=guessing).x for s in (config.train, config.test))
        yield from self._measured(self._guesses(trained), self._guesses(tested), train, test, held)

    def heads_of(self, width: int) -> int:
        """Heads of the attention over so wide patches.

        Raises:
            ConfigError: they do not divide the width.
        """
        heads = self.config.heads or next(count for count in (16, 8, 4, 2, 1) if width % count == 0)
        if width % heads:
            raise ConfigError(f"attentive_probe.heads: {heads} do not divide the encoder's width of {width}")
        return heads

    def _guesses(self, x: Tensor) -> Tensor:
        """int64[P,N,G] of what the probes gave."""
        return x.view(len(x), len(self.config.grid), -1).transpose(0, 1).long()

    def _measured(
        self, trained: Tensor, tested: Tensor, train: Features, test: Features, held: Tensor
    ) -> Iterator[Output]:
        """Choose on the held-out part, report on the test stream."""
        config = self.config
        hits = (trained[:, held, 0] == train.label[held]).sum(dim=1).tolist()
        best = max(range(len(hits)), key=hits.__getitem__)
        if not hits[best]:
            raise DataError(
                f"no probe classifies a single one of {len(held)} held-out samples of stream {config.train!r}; they "
                "have diverged (lower attentive_probe.rates), or there are too few samples"
            )
        rate, decay = config.grid[best]
        yield from classified("attentive_probe", tested[best], test.label, train.classes, config.test)
        facts: Mapping[str, float] = {
            "rate": rate,
            "rate_at_edge": float(len(config.rates) > 1 and rate in (min(config.rates), max(config.rates))),
            "decay": decay,
            "decay_at_edge": float(len(config.decays) > 1 and decay in (min(config.decays), max(config.decays))),
        }
        for key, value in facts.items():
            yield Number(f"attentive_probe/{key}", value, len(train.x), config.train, better=None)
        rows = [
            [*self.config.grid[i], right / len(held), "chosen" if i == best else None] for i, right in enumerate(hits)
        ]
        yield Table("attentive_probe/probes", ["rate", "decay", "held-out top-1", "chosen"], rows, config.train)
