"""Domains of the source: which sample is of which, by the source in ``data.train`` that it comes from.

Shape letters: B samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import DataFacts


def domain_of(ids: Tensor, facts: DataFacts) -> Tensor:
    """Number of each sample's domain in ``facts.domains``, int64[B], of ids of ``data.train``, int64[B]."""
    if len(facts.sources) < 2:
        return torch.zeros_like(ids)
    begins, numbers = torch.tensor(facts.sources, device=ids.device).unbind(1)
    return numbers[torch.searchsorted(begins.contiguous(), ids, right=True) - 1]


def check_sources(facts: DataFacts, what: str) -> None:
    """Hold the data against what compares domains.

    Raises:
        ConfigError: there is one domain.
    """
    if len(facts.domains) < 2:
        there = facts.domains[0] if facts.domains else "without a name"
        raise ConfigError(
            f"{what} compares the domains of data.train, and there is one ({there}); name several sources, as "
            """train = [{ path = "a", domain = "x" }, { path = "b", domain = "y" }]"""
        )
