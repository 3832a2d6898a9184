"""Linear heads trained by SGD on frozen features: a grid of learning rates, blocks and pooling from one pass.

DINOv2's protocol (Oquab et al. 2023; ``dinov2/eval/linear.py``): 13 learning rates, the class tokens of the last block
or of the last four, with the mean of the patches or without, 52 heads in all, SGD with a cosine to zero. Unlike there,
the head is chosen on a tenth of the training stream, trained anew on all of it, and the test stream is looked at once.
Features are those of the suite's geometry, one view an image: no crops are drawn.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field, field_serializer, model_validator
from torch import Tensor, nn

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.evaluation import OWN, EvalContext, Evaluation, Features, Number, Output, Reading, Table, Uses
from pipeline.dist.group import by_first
from pipeline.evals._classes import in_classes_of
from pipeline.evals._classified import classified, guesses
from pipeline.evals._heads import Course, Head, Heads
from pipeline.evals._kept_head import KeptHead, content_of, keep_head, kept_head
from pipeline.evals._probe import Rates, check_samples, held_out
from pipeline.nn.reading import offered
from pipeline.nn.weights import weights_hash

Pool = Literal["own", "cls", "mean", "cls+mean"]
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
COUNTS = (1, 4)
"""Of blocks, where none are named."""
EPOCHS, FEWEST = 10, 1000
"""Length that is left out: so many epochs, and at least so many steps."""


class Config(Strict):
    """Settings of the linear probe."""

    train: str = "train"
    """Stream that heads are trained on."""
    test: str = "val"
    """Stream that is classified."""
    rates: Rates = RATES
    """Learning rates, for a batch of 256: they are multiplied by ``batch`` / 256."""
    blocks: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] | None = None
    """How many of the last blocks give their class tokens; left out: 1 and 4, as far as there are so many."""
    pool: Annotated[tuple[Pool, ...], Field(min_length=1)] | None = None
    """Class tokens, the mean of the last block's patches, both, or what the encoder itself gives; left out: "cls" and
    "cls+mean", without a class token "own" and "mean", and "own" where no blocks can be read."""
    batch_norm: bool = False
    """Behind a batch norm without scale and shift, as MAE."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Left out: ten epochs, and at least 1000 steps."""
    batch: Annotated[int, Field(ge=1)] = 1024
    """Samples per step, whatever the number of ranks; no more than there are."""
    head: str | None = None
    """File or folder of a head that was kept: it is measured, and none is trained. What is in it identifies numbers."""
    seed: int = 0

    @field_serializer("head")
    def _by_content(self, head: str | None) -> str | None:
        return head and content_of(head)

    @model_validator(mode="after")
    def _no_blocks_in_vain(self) -> "Config":
        if self.blocks is not None and self.pool is not None and not any("cls" in pool for pool in self.pool):
            raise ValueError("'blocks' is for the class tokens of blocks; pool has no \"cls\"")
        return self


class LinearProbe(Evaluation):
    """Reports "linear_probe/top1", "top5" with at least five classes, the mean recall of the classes and the table of
    confusions, of the head that was chosen; it is kept as head.safetensors in the folder of the evaluation.

    "linear_probe/rate" is its learning rate, "rate_at_edge" is 1 where that is the first or last of those tried, so
    that others might give more, and "blocks" is how many it reads. The table "linear_probe/heads" has every head of the
    grid with its accuracy on the held-out part; heads that diverged have 0.
    """

    version = 2

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """What heads are trained on, unless one is given, and what is classified."""
        streams = [self.config.test] if self.config.head else [self.config.train, self.config.test]
        return Uses({name: ("image", "label") for name in streams})

    def scores(self, classes: int) -> Mapping[str, tuple[float, float]]:
        """The share of a class."""
        return {f"linear_probe/top{k}": (k / classes, 1.0) for k in (1, 5) if k <= classes}

    def check(self, ctx: EvalContext) -> None:
        """Readings that the encoder offers; a head that fits it."""
        if self.config.head is None:
            readings_of(self.config.blocks, self.config.pool, ctx.encoders["image"])
        else:
            self._given(ctx)

    def run(self, ctx: EvalContext) -> Iterator[Output]:
        """Extract on all ranks, train on the first, tell all.

        Raises:
            DataError: too little to train on, or a test sample of a class that training lacks.
        """
        if self.config.head is not None:
            yield from self._with_given(ctx, self._given(ctx))
            return
        readings = readings_of(self.config.blocks, self.config.pool, ctx.encoders["image"])
        train, test = (
            ctx.readings("image", stream, whole(readings)) for stream in (self.config.train, self.config.test)
        )
        (train, columns), (test, _) = (laid_out(readings, found) for found in (train, test))
        test = in_classes_of(test, train.classes, self.config.test, f"stream {self.config.train!r}")
        check_samples(train, test, self.config.train, self.config.test)
        search = Search(self.config, columns, ctx)
        yield from by_first(lambda: search.measured(train, test))

    def _given(self, ctx: EvalContext) -> KeptHead:
        path = self.config.head
        assert path is not None
        head = by_first(lambda: kept_head(path, ctx.encoders["image"]))
        blocks, pool = head.reading
        if self.config.pool not in (None, (pool,)) or self.config.blocks not in (None, (blocks,)):
            raise ConfigError(f"linear_probe.head: {path} reads {pool!r} of {blocks} blocks, not what the settings say")
        return head

    def _with_given(self, ctx: EvalContext, head: KeptHead) -> Iterator[Output]:
        test = ctx.readings("image", self.config.test, [head.reading])[head.reading]
        test = in_classes_of(test, head.classes, self.config.test, "the head")
        scores = head.linear.scores(test.x)
        yield from classified("linear_probe", guesses(scores), test.label, head.classes, self.config.test)


class Search:
    """Trains the grid, chooses, trains the chosen one on all.

    Args:
        config: of the evaluation.
        columns: of the features, for every reading.
        ctx: of the evaluation.
    """

    def __init__(self, config: Config, columns: Mapping[Reading, slice], ctx: EvalContext) -> None:
        self.config, self.columns, self.ctx = config, columns, ctx

    def measured(self, train: Features, test: Features) -> list[Output]:
        """All outputs; the head that was chosen is kept."""
        config, n = self.config, len(train.x)
        grid = [Head(rate, reading) for reading in self.columns for rate in sorted(config.rates)]
        best, outputs = self._choose(train, grid) if len(grid) > 1 else (0, [])
        chosen = grid[best]
        heads = self._trained(train, [chosen], torch.arange(n))
        linear = heads.head(0)
        encoder = weights_hash({"image": self.ctx.encoders["image"]})
        keep_head(self.ctx.folder, KeptHead(linear, chosen.reading, chosen.rate, train.classes, encoder))
        edge = len(config.rates) > 1 and chosen.rate in (min(config.rates), max(config.rates))
        facts = {"rate": chosen.rate, "rate_at_edge": float(edge), "blocks": float(chosen.reading.blocks)}
        scores = linear.scores(test.x[:, self.columns[chosen.reading]])
        return [
            *classified("linear_probe", guesses(scores), test.label, train.classes, config.test),
            *(Number(f"linear_probe/{key}", value, n, config.train, better=None) for key, value in facts.items()),
            *outputs,
        ]

    def _choose(self, train: Features, grid: Sequence[Head]) -> tuple[int, list[Output]]:
        """Number of the head that does best on the held-out part, of equals the first; and the table of all."""
        held, rest = held_out(len(train.x))
        hits = self._trained(train, grid, rest).hits(train.x, train.label, held)
        best = max(range(len(grid)), key=hits.__getitem__)
        if not hits[best]:
            raise DataError(
                f"no head of the grid classifies a single one of {len(held)} held-out samples of stream "
                f"{self.config.train!r}; they have diverged (lower linear_probe.rates) or there are too few samples"
            )
        columns = ["rate", "blocks", "pool", "held-out top-1", "chosen"]
        cells = [
            [head.rate, head.reading.blocks, head.reading.pool, right / len(held), "chosen" if i == best else None]
            for i, (head, right) in enumerate(zip(grid, hits, strict=True))
        ]
        return best, [Table("linear_probe/heads", columns, cells, self.config.train)]

    def _trained(self, train: Features, grid: Sequence[Head], places: Tensor) -> Heads:
        config = self.config
        steps = config.steps or max(FEWEST, math.ceil(EPOCHS * len(places) / config.batch))
        course = Course(steps, config.batch, config.batch_norm, config.seed)
        heads = Heads(grid, self.columns, len(train.classes), course, self.ctx.place.device)
        heads.train(train.x, train.label, places, partial(self.ctx.show, "training of heads"))
        return heads


def readings_of(blocks: Sequence[int] | None, pool: Sequence[Pool] | None, encoder: nn.Module) -> list[Reading]:
    """The readings of a grid.

    Raises:
        ConfigError: the encoder does not offer them.
    """
    there, token = offered(encoder)
    pools = pool or (("cls", "cls+mean") if token else ("own", "mean") if there else ("own",))
    depths = blocks or [count for count in COUNTS if count <= there]
    for name in pools:
        if "cls" in name and not token:
            raise ConfigError(f'linear_probe.pool: the encoder has no class token for {name!r}; take "own" or "mean"')
        if name != "own" and not there:
            raise ConfigError(f'linear_probe.pool: no blocks of this encoder can be read for {name!r}; take "own"')
    if blocks is not None and not any("cls" in name for name in pools):
        raise ConfigError("linear_probe.blocks: this encoder has no class token that blocks could give; leave it out")
    if depths and max(depths) > there and any("cls" in name for name in pools):
        raise ConfigError(f"linear_probe.blocks: {max(depths)} are to be read, and the encoder has {there}")
    found = [
        reading
        for name in pools
        for reading in (
            [OWN] if name == "own" else [Reading(1, name)] if name == "mean" else [Reading(n, name) for n in depths]
        )
    ]
    return list(dict.fromkeys(found))


def whole(readings: Sequence[Reading]) -> list[Reading]:
    """Readings that hold all of ``readings``, so that what several share is kept once."""
    found = [OWN] if OWN in readings else []
    if deepest := max((r.blocks for r in readings if "cls" in r.pool), default=0):
        found.append(Reading(deepest, "cls+mean" if any("mean" in r.pool for r in readings) else "cls"))
    elif any(r.pool == "mean" for r in readings):
        found.append(Reading(1, "mean"))
    return found


def laid_out(readings: Sequence[Reading], found: Mapping[Reading, Features]) -> tuple[Features, dict[Reading, slice]]:
    """Features of :func:`whole` readings side by side, and the columns of them that each of ``readings`` is."""
    parts = list(found.values())
    features = parts[0] if len(parts) == 1 else parts[0]._replace(x=torch.cat([part.x for part in parts], dim=1))
    first, columns = 0, dict[Reading, slice]()
    for reading, part in found.items():
        width = part.x.shape[1]
        if reading == OWN:
            columns[OWN] = slice(first, first + width)
        else:  # class tokens from the earliest block on, then the mean
            count = reading.blocks * ("cls" in reading.pool)
            size = width // (count + ("mean" in reading.pool))
            middle = first + count * size
            for r in readings:
                if r != OWN:
                    start = middle - size * r.blocks * ("cls" in r.pool)
                    columns[r] = slice(start, middle + size * ("mean" in r.pool))
        first += width
    return features, {reading: columns[reading] for reading in readings}
