"""On an accelerator every objective gives the loss and gradient that it gives on the processor, from the same draws."""

from __future__ import annotations

import pytest
import torch

from pipeline.core import registry
from tests.contracts.components import CONTEXT, build_objective, make_batch

NAMES = registry.names("pipeline.objectives")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
]


def loss_and_gradient(name: str, device: str) -> tuple[float, torch.Tensor]:
    objective = build_objective(name).train().to(device)
    batch = {field: value.to(device) for field, value in make_batch(objective, name).items()}
    output = objective(batch, CONTEXT)
    output.loss.backward()
    gradients = [p.grad.flatten().cpu() for p in objective.parameters() if p.grad is not None]
    return float(output.loss), torch.cat(gradients)


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient(name):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    here, there = loss_and_gradient(name, "cpu"), loss_and_gradient(name, "cuda")
    assert there[0] == pytest.approx(here[0], rel=1e-4)
    assert float((there[1] - here[1]).norm() / here[1].norm()) < 1e-3
