"""What evaluations that fit a classifier on features share: the part that chooses, scaling, and what is too little.

Shape letters: N samples, D width.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from pipeline.core.errors import DataError
from pipeline.core.evaluation import Features

HELD_OUT = 10
"""One in so many training samples chooses the settings, and is not fitted on meanwhile."""

Scale = Literal["standardise", "normalise", "none"]
"""Each feature to mean 0 and variance 1, as MAE's batch norm before its probe; each sample to length 1; neither."""
Rates = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]


def held_out(samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Numbers of the samples that choose, a tenth drawn at random, and of all others: int64 each."""
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    return order[: samples // HELD_OUT], order[samples // HELD_OUT :]


def rows(features: Features, places: Tensor) -> Features:
    """Some of the samples."""
    fields = {name: value[places] for name, value in features.fields.items()}
    return Features(features.x[places], fields, features.classes)


def scaled(scale: Scale, known: Tensor, *others: Tensor) -> list[Tensor]:
    """Features [N,D], and others, scaled by what is known of the first."""
    parts = [known, *others]
    if scale == "none":
        return parts
    if scale == "normalise":
        return [functional.normalize(x) for x in parts]
    mean, std = statistics(known)
    return [(x - mean) / std for x in parts]


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature of [N,D], [D] each."""
    return x.mean(dim=0), (x.var(dim=0, unbiased=False) + 1e-6).sqrt()


def check_samples(train: Features, test: Features, train_stream: str, test_stream: str) -> None:
    """Hold data against what a classifier needs; ``test`` is in the classes of ``train``.

    Raises:
        DataError: fewer than two classes, too few samples, or a test sample of a class that there is nothing to learn
            of; features that are not finite.
    """
    counts = torch.bincount(train.label, minlength=len(train.classes))
    if int((counts > 0).sum()) < 2 or len(train.x) < 2 * HELD_OUT:
        raise DataError(
            f"stream {train_stream!r} has {len(train.x)} samples of {int((counts > 0).sum())} classes; "
            f"a probe needs two classes and {2 * HELD_OUT} samples"
        )
    missing = [train.classes[number] for number in test.label.unique().tolist() if not counts[number]]
    if missing:
        more = f" and of {len(missing) - 1} more classes" if len(missing) > 1 else ""
        raise DataError(
            f"stream {test_stream!r} has samples of class {missing[0]!r}{more}, of which stream {train_stream!r} has "
            "none to learn from; measure on data of the same classes"
        )
    for stream, features in ((train_stream, train), (test_stream, test)):
        if bad := int((~features.x.isfinite()).any(dim=1).sum()):
            raise DataError(f"the features of {bad} of {len(features.x)} samples of stream {stream!r} are not finite")
