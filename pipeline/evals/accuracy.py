"""How often a classifier that was trained with its encoder is right: for fine-tuning and supervised training.

One view per image, in the suite's geometry; no ensembling.
"""

import math
from collections.abc import Iterator, Mapping

from torch import nn

from pipeline.config.schema import Strict
from pipeline.core.errors import DataError
from pipeline.core.protocols import EvalStream, Evaluation, Result
from pipeline.evals._features import extract, named_stream


class Config(Strict):
    """Settings of the accuracy."""

    test: str = "val"
    """Stream that is classified."""


class Accuracy(Evaluation):
    """Reports "accuracy/top1" and, with at least five classes, "accuracy/top5"."""

    needs = ("logits",)

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, encoders: Mapping[str, nn.Module], streams: Mapping[str, EvalStream]) -> Iterator[Result]:
        """Classify on all ranks and count.

        Raises:
            DataError: the classifier was trained on another number of classes.
        """
        stream = named_stream(streams, self.config.test, "accuracy.test")
        logits, label, classes = extract(encoders["logits"], stream)
        if logits.shape[1] != classes:
            raise DataError(
                f"the classifier knows {logits.shape[1]} classes, stream {self.config.test!r} has {classes}; "
                "measure on shards with the classes that it was trained on"
            )
        hits = logits.topk(min(5, classes), dim=1).indices == label[:, None]
        n = len(label)
        for name, k in (("top1", 1), ("top5", 5)):
            if k <= classes:
                p = int(hits[:, :k].sum()) / n
                yield Result(f"accuracy/{name}", p, n, self.config.test, math.sqrt(p * (1 - p) / n))
