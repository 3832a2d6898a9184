"""VICReg against its authors' loss, as plainly as it can be written, and cut to pieces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.core.protocols import Embeddings
from tests.unit.objectives.two_views import (
    CTX,
    build,
    check_as_written,
    check_global_statistics,
    check_views,
    off_diagonal,
    rows,
)


def vicreg(first: Tensor, second: Tensor) -> Tensor:
    """facebookresearch/vicreg, main_vicreg.py, ``forward``, on one process."""
    spread, together = first.new_zeros(()), first.new_zeros(())
    for x in (first, second):
        spread = spread + functional.relu(1 - (x.var(dim=0) + 0.0001).sqrt()).mean() / 2
        together = together + off_diagonal(torch.cov(x.T)).pow(2).sum() / x.shape[1]
    return 25 * functional.mse_loss(first, second) + 25 * spread + together


def test_loss_and_gradient_are_those_of_the_authors_code(lone_group):
    check_as_written("vicreg", vicreg)


@pytest.mark.parametrize(("world", "accumulation"), [(1, 4), (2, 2)])
def test_statistics_are_those_of_the_global_batch_however_it_is_cut(world, accumulation):
    check_global_statistics("vicreg", vicreg, world, accumulation)


def test_views_are_coloured_unequally_and_encoded_each_by_itself(lone_group):
    check_views("vicreg")


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
