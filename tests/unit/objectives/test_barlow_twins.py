"""Barlow Twins against its authors' loss, as plainly as it can be written, and cut to pieces."""

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


def barlow_twins(first: Tensor, second: Tensor) -> Tensor:
    """facebookresearch/barlowtwins, main.py, ``forward``, on one process."""
    one, other = (functional.batch_norm(x, None, None, training=True) for x in (first, second))
    c = one.T @ other / len(first)
    return (c.diagonal() - 1).pow(2).sum() + 0.0051 * off_diagonal(c).pow(2).sum()


def test_loss_and_gradient_are_those_of_the_authors_code(lone_group):
    check_as_written("barlow_twins", barlow_twins)


@pytest.mark.parametrize(("world", "accumulation"), [(1, 4), (2, 2)])
def test_statistics_are_those_of_the_global_batch_however_it_is_cut(world, accumulation):
    check_global_statistics("barlow_twins", barlow_twins, world, accumulation)


def test_views_are_coloured_unequally_and_encoded_each_by_itself(lone_group):
    check_views("barlow_twins")


def test_a_correlation_is_blind_to_scale_and_place(lone_group):
    first, second, embeddings = rows()
    moved = {"embedding": 7 * first.float() + 3, "embedding2": 0.5 * second.float(), "features": first.float()}
    model = build("barlow_twins")
    expected = model.loss(embeddings, CTX).loss
    torch.testing.assert_close(model.loss(Embeddings(moved, {}), CTX).loss, expected, rtol=1e-3, atol=1e-4)
