"""A linear classifier on frozen features: how much of the classes can be read off without changing the encoder.

Logistic regression on standardised features, as in Chen et al. (2020) and DINOv2 (Oquab et al. 2023).
"""

from collections.abc import Iterator, Mapping

import torch.distributed as dist
from torch import nn

from pipeline.core.protocols import EvalStream, Evaluation, Result
from pipeline.dist.group import from_first
from pipeline.evals._features import Features, extract, named_stream
from pipeline.evals._probe import Probe, ProbeConfig, check_size


class Config(ProbeConfig):
    """Settings of the linear probe."""


class LinearProbe(Evaluation):
    """Reports "linear_probe/top1", "linear_probe/top5" with at least five classes, and how the fit went.

    "linear_probe/l2" is the strength chosen, "linear_probe/l2_at_edge" is 1 where it is the first or last of the
    grid, so that a wider grid might give more, and "linear_probe/converged" is 0 where the final fit ran out of
    iterations.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, encoders: Mapping[str, nn.Module], streams: Mapping[str, EvalStream]) -> Iterator[Result]:
        """Extract on all ranks, fit on the first, tell all.

        Raises:
            DataError: a training stream of fewer than two classes.
        """
        train = extract(encoders["image"], named_stream(streams, self.config.train, "linear_probe.train"))
        test = extract(encoders["image"], named_stream(streams, self.config.test, "linear_probe.test"))
        check_size(train, self.config.train)
        yield from from_first(self.probe(train, test) if dist.get_rank() == 0 else [])

    def probe(self, train: Features, test: Features) -> list[Result]:
        """Choose the strength, fit on all of ``train`` and measure on ``test``."""
        return Probe(self.config, "linear_probe").probe(train, test)
