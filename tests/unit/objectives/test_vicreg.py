"""VICReg: its three terms; its loss is held in test_two_views.py."""

from __future__ import annotations

import pytest
import torch

from pipeline.core.protocols import Embeddings
from tests.unit.objectives.two_views import CTX, build, rows


def test_the_three_terms_of_vicreg_are_told_and_weighted(lone_group):
    _, _, embeddings = rows()
    out = build("vicreg", invariance=2.0, variance=3.0, covariance=5.0).loss(embeddings, CTX)
    told = {name: float(value) for name, value in out.metrics.items()}
    weighted = 2 * told["invariance"] + 3 * told["variance"] + 5 * told["covariance"]
    assert float(out.loss.detach()) == pytest.approx(weighted, rel=1e-6)
    equal = Embeddings({n: torch.ones(10, 6) for n in ("embedding", "embedding2", "features")}, {})
    collapsed = build("vicreg").loss(equal, CTX).metrics
    assert float(collapsed["variance"]) == pytest.approx(1 - 0.0001**0.5) and float(collapsed["covariance"]) == 0
    assert float(build("vicreg", deviation=2.0).loss(equal, CTX).metrics["variance"]) == pytest.approx(1.99)
