"""Batch norm per domain: running statistics of the source beside those of the target, which the model keeps.

Chang et al., "Domain-Specific Batch Normalization for Unsupervised Domain Adaptation" (CVPR 2019), but with common
scale and shift; Li et al., "Revisiting Batch Normalization For Practical Domain Adaptation" (2016, AdaBN).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

NAMES = ("running_mean", "running_var", "num_batches_tracked")


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    """Its batch norms that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


class SourceStatistics(nn.Module):
    """Running statistics of a model's batch norms on the source; those in the model itself become the target's.

    Args:
        model: whose batch norms; it is not a part of this module.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for number, norm in enumerate(norms_of(model)):
            for name in NAMES:
                self.register_buffer(f"{name}_{number}", getattr(norm, name).clone())

    @contextmanager
    def within(self, model: nn.Module) -> Iterator[None]:
        """Inside, ``model`` uses and moves the source's."""
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    def _exchange(self, model: nn.Module) -> None:
        for number, norm in enumerate(norms_of(model)):
            for name in NAMES:
                own, other = f"{name}_{number}", getattr(norm, name)
                mine: Tensor = getattr(self, own)
                setattr(norm, name, mine)
                setattr(self, own, other)
