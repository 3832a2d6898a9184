"""Scores by which a checkpoint of an adapted model can be chosen without a label of the target.

- Accuracy on labelled samples of the source that were held out ("source validation").
- The same with each sample weighted by how much more likely the target is to give it: Sugiyama et al., "Covariate
  Shift Adaptation by Importance Weighted Cross Validation" (JMLR 2007). The ratio of densities comes from a logistic
  regression that tells the two domains apart on features (Bickel et al., "Discriminative Learning for Differing
  Training and Test Distributions", ICML 2007); weights are made to have mean 1.
- Mean entropy of the answers on the target (Morerio et al., "Minimal-Entropy Correlation Alignment", ICLR 2018).
- Soft neighbourhood density (Saito et al. 2021) and batch nuclear norm (Cui et al. 2020) of the answers on the target.

How far such scores are from the truth: Musgrave et al., "Benchmarking Validation Methods for Unsupervised Domain
Adaptation" (arXiv 2208.07360). The labels of the target are not read. Shape letters: N samples, K classes, D width.
"""

import math
from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from pipeline.config.schema import Strict
from pipeline.core.errors import DataError
from pipeline.core.evaluation import EvalContext, Evaluation, Number, Output, Uses
from pipeline.dist.group import by_first
from pipeline.evals._classes import in_classes_of
from pipeline.nn.adaptation.information import batch_nuclear_norm, entropy, soft_neighbourhood_density


class Config(Strict):
    """Settings of the scores."""

    source: str = "source"
    """Stream of labelled samples of the source that the model was not trained on."""
    target: str = "target"
    """Stream of the target; its labels are not read."""
    train: str = "train"
    """Stream of the source, for telling the domains apart; its labels are not read."""
    temperature: Annotated[float, Field(gt=0)] = 0.05
    """Of the soft neighbourhood density."""


class Selection(Evaluation):
    """Reports "selection/source_accuracy", "selection/importance_weighted", "selection/snd" and "selection/bnm", of
    which more is better, and "selection/entropy", of which less is; and "selection/effective_samples", the number of
    source samples that carry the importance weights, as a part of all.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """Labels of the held-out source alone."""
        config = self.config
        streams = {config.train: ("image",), config.target: ("image",)}
        return Uses(streams | {config.source: ("image", "label")}, ("image", "logits"))

    def run(self, ctx: EvalContext) -> Iterator[Output]:
        """Classify on all ranks, and measure what all know.

        Raises:
            DataError: a source sample is of a class that the classifier was not trained on; too few samples.
        """
        config = self.config
        source, target = ctx.features("logits", config.source), ctx.features("logits", config.target, ())
        label = in_classes_of(source, ctx.classes["logits"], config.source, "the classifier").label
        if len(target.x) < 2:
            raise DataError(f"stream {config.target!r} has {len(target.x)} samples; their answers are compared")
        right = (source.x.argmax(dim=1) == label).double()
        yield _mean("source_accuracy", right, config.source, "higher")
        features = [ctx.features("image", name, ()).x for name in (config.train, config.source, config.target)]
        weight = by_first(lambda: density_ratio(*features))
        effective = float(weight.sum().square() / weight.square().sum()) / len(weight)
        value = float((weight * right).sum() / weight.sum())
        yield Number("selection/importance_weighted", value, len(right), config.source)
        yield Number("selection/effective_samples", effective, len(right), config.source, better=None)
        yield _mean("entropy", entropy(target.x.double()), config.target, "lower")
        p = target.x.double().softmax(dim=1)
        density = float(soft_neighbourhood_density(p, config.temperature))
        yield Number("selection/snd", density, len(p), config.target)
        yield Number("selection/bnm", float(batch_nuclear_norm(p)), len(p), config.target)


def _mean(name: str, values: Tensor, split: str, better: str) -> Number:
    n = len(values)
    error = float(values.std()) / math.sqrt(n) if n > 1 else None
    samples = values.float().numpy()
    return Number(
        f"selection/{name}",
        float(values.mean()),
        n,
        split,
        error,
        "lower" if better == "lower" else "higher",
        samples,
    )


def density_ratio(train: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """How much more likely the target is than the source to give each held-out sample of the source, with mean 1.

    Args:
        train: features of the source, [N,D]; with those of the target they teach a logistic regression the domains.
        source: features of what is weighted, [M,D].
        target: features of the target, [N',D].

    Returns:
        float64[M].
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = torch.cat([train, target]).double().numpy()
    domain = torch.cat([torch.zeros(len(train)), torch.ones(len(target))]).numpy()
    judge = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x, domain)
    # The logit is log p(target | x) / p(source | x); the numbers of samples of both are a constant factor.
    logit = torch.from_numpy(judge.decision_function(source.double().numpy()))
    weight = (logit - logit.max()).exp()
    return weight / weight.mean()
