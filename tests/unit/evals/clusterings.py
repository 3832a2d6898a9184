"""What the tests of clusterings share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.core.errors import ConfigError
from pipeline.core.evaluation import Evaluation
from tests.contracts.components import ListStream, context, numbers
from tests.unit.evals.test_knn import Identity, make_streams


def points(count: int = 40) -> np.ndarray:
    """float32[count,3]."""
    return np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32)


def finds_classes_far_apart(evaluation: Evaluation, name: str) -> None:
    """Four classes in four directions, at any length."""
    label = torch.arange(80) % 4
    x = torch.eye(4, 12)[label] * torch.linspace(0.5, 3, 80)[:, None]
    x = x + 0.01 * torch.randn(80, 12, generator=torch.Generator().manual_seed(1))
    found = numbers(evaluation, context({"image": Identity()}, {"val": ListStream(x, label)}))
    assert [found[f"{name}/{key}"].value for key in ("nmi", "ari", "accuracy")] == pytest.approx([1, 1, 1])


def refuses_more_clusters_than_samples(evaluation: Evaluation, name: str) -> None:
    """Its setting is 50."""
    with pytest.raises(ConfigError, match=rf"{name}\.clusters: 50 clusters of 31 samples"):
        numbers(evaluation, context({"image": Identity()}, make_streams()))
