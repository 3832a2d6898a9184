"""Where a denoiser keeps what it knows of classes: linear probes of its blocks at several noise levels.

Xiang et al., "Denoising Diffusion Autoencoders are Unified Self-supervised Learners" (ICCV 2023, arXiv 2303.09769): the
best block is one of the decoder's at little noise, and which one it is, is chosen on images that are not tested on.
Shape letters: N samples, D channels of all blocks together.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field

from pipeline.core.errors import ConfigError
from pipeline.core.evaluation import EvalContext, Evaluation, Features, Number, Output, Uses
from pipeline.core.registry import suggest
from pipeline.dist.group import by_first
from pipeline.evals._classes import in_classes_of
from pipeline.evals._denoiser import denoiser_of
from pipeline.evals._logistic import LogisticConfig, Regression
from pipeline.evals._probe import check_samples, held_out, rows
from pipeline.nn.diffusion.features import DenoiserFeatures
from pipeline.nn.diffusion.model import Generator

L2 = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Strengths that are tried, unless settings say others."""


class Config(LogisticConfig):
    """Settings of the search; those of the probes are those of "logistic_regression", with fewer strengths."""

    noise: Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], Field(min_length=1)] = (0.01, 0.05, 0.1, 0.2)
    """Quantiles of the noise levels."""
    blocks: tuple[str, ...] | None = None
    """Blocks by their names; left out: all."""

    def strengths(self, samples: int) -> list[float]:
        """Left out: six, since there are as many fits as blocks and noise levels."""
        if self.c is None and self.l2 is None:
            return [1 / (l2 * samples) for l2 in L2]
        return super().strengths(samples)


class DenoiserProbe(Evaluation):
    """Reports "denoiser_probe/BLOCK@NOISE", the accuracy on a held-out tenth of the training stream, for the grid;
    and for the best of it "denoiser_probe/top1" on the test stream, its "_noise", and what the regression reports.
    """

    version = 2

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """The denoiser itself."""
        return Uses(self.config.uses().streams, ("generator",))

    def check(self, ctx: EvalContext) -> None:
        """Blocks that are there."""
        self._blocks(denoiser_of(ctx))

    def run(self, ctx: EvalContext) -> Iterator[Output]:
        """Extract all blocks on all ranks, a noise level at a time; fit on the first, tell all.

        Raises:
            DataError: too little to fit, or a test sample of a class that training lacks.
        """
        generator = denoiser_of(ctx)
        blocks = self._blocks(generator)
        found: dict[tuple[str, float], Sequence[Features]] = {}
        for noise in self.config.noise:
            encoder = DenoiserFeatures(generator.denoiser, generator.process, tuple(blocks), noise, generator.space)
            name = f"generator.{'+'.join(blocks)}@{noise!r}"
            train, test = (ctx.features(name, s, module=encoder) for s in (self.config.train, self.config.test))
            test = in_classes_of(test, train.classes, self.config.test, f"stream {self.config.train!r}")
            check_samples(train, test, self.config.train, self.config.test)
            widths = list(blocks.values())
            for block, *parts in zip(blocks, *(_split(f, widths) for f in (train, test)), strict=True):
                found[block, noise] = parts
        yield from by_first(lambda: self._search(found, ctx.place.device))

    def _blocks(self, generator: Generator) -> dict[str, int]:
        """The blocks that are tried, with their widths."""
        taps: dict[str, int] = generator.denoiser.network.taps  # pyright: ignore[reportAssignmentType]
        wanted = self.config.blocks or tuple(taps)
        if unknown := [block for block in wanted if block not in taps]:
            raise ConfigError(f"denoiser_probe.blocks: there is no {unknown[0]!r}; {suggest(unknown[0], list(taps))}")
        return {block: taps[block] for block in wanted}

    def _search(self, found: Mapping[tuple[str, float], Sequence[Features]], device: torch.device) -> list[Output]:
        regression = Regression(self.config, "denoiser_probe", device)
        results: list[Output] = []
        best, chosen = -1.0, next(iter(found))
        for (block, noise), (train, _) in found.items():
            held, rest = held_out(len(train.x), seed=1)
            outputs = regression.measured(rows(train, rest), rows(train, held))
            top1 = next(o for o in outputs if isinstance(o, Number) and o.name == "denoiser_probe/top1")
            name = f"denoiser_probe/{block}@{noise:g}"
            results.append(top1._replace(name=name, split=self.config.train, better=None))
            if top1.value > best:
                best, chosen = top1.value, (block, noise)
        results += regression.measured(*found[chosen])
        n = len(found[chosen][0].x)
        return [*results, Number("denoiser_probe/noise", chosen[1], n, self.config.train, better=None)]


def _split(features: Features, widths: list[int]) -> list[Features]:
    return [features._replace(x=x) for x in features.x.split(widths, dim=1)]
