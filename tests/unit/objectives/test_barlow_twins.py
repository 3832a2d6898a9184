"""Barlow Twins: what its correlation does not see; its loss is held in test_two_views.py."""

from __future__ import annotations

import torch

from pipeline.core.protocols import Embeddings
from tests.unit.objectives.two_views import CTX, build, rows


def test_a_correlation_is_blind_to_scale_and_place(lone_group):
    first, second, embeddings = rows()
    moved = {"embedding": 7 * first.float() + 3, "embedding2": 0.5 * second.float(), "features": first.float()}
    model = build("barlow_twins")
    expected = model.loss(embeddings, CTX).loss
    torch.testing.assert_close(model.loss(Embeddings(moved, {}), CTX).loss, expected, rtol=1e-3, atol=1e-4)
