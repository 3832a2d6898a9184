"""Several data sets in one stream, by weight, each with an order and a cursor of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.core.errors import ConfigError
from pipeline.data.order import Draw, Ints, Order


def shares(global_batch: int, weights: Sequence[float]) -> list[int]:
    """Samples of each source in a global batch: in proportion to the weights, by largest remainder.

    Raises:
        ConfigError: a source would get none.
    """
    exact = [global_batch * w / sum(weights) for w in weights]
    whole = [int(x) for x in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (whole[i] - exact[i], i))
    for i in by_remainder[: global_batch - sum(whole)]:
        whole[i] += 1
    if 0 in whole:
        raise ConfigError(
            f"data.train[{whole.index(0)}]: of a global batch of {global_batch}, its weight leaves it no sample; "
            "raise the weight or run.global_batch, or remove the source"
        )
    return whole


@dataclass(frozen=True)
class Mixture:
    """The order of several sources: global batches hold a fixed number of samples of each, evenly interleaved.

    Ids run through the sources one after the other. A sample's epoch is the one of its source.

    Args:
        orders: one per source; their global batches are the sources' shares.
    """

    orders: tuple[Order, ...]

    @property
    def global_batch(self) -> int:
        """Samples per step over all sources."""
        return sum(o.global_batch for o in self.orders)

    @property
    def samples(self) -> int:
        """Samples in all sources."""
        return sum(o.samples for o in self.orders)

    @property
    def identity(self) -> dict[str, Any]:
        """All that fixes the order, beside the data."""
        return {"sources": [o.identity for o in self.orders]}

    @cached_property
    def _slots(self) -> tuple[Ints, Ints]:
        """int64[G] twice: the source of each position of the global batch, and its number among that source's."""
        sizes = [o.global_batch for o in self.orders]
        even = np.concatenate([(np.arange(n) + 0.5) / n for n in sizes])
        order = np.argsort(even, kind="stable")
        source = np.repeat(np.arange(len(sizes)), sizes)[order]
        return source, np.concatenate([np.arange(n) for n in sizes])[order]

    @cached_property
    def _bases(self) -> Ints:
        return np.cumsum([0, *(o.samples for o in self.orders)])

    def batch(self, step: int, first: int, last: int) -> Draw:
        """See :meth:`Order.batch`."""
        source, number = self._slots[0][first:last], self._slots[1][first:last]
        epochs, ids = np.empty_like(number), np.empty_like(number)
        for i in np.unique(source).tolist():
            chosen = source == i
            own = number[chosen]
            drawn = self.orders[i].batch(step, int(own[0]), int(own[-1]) + 1)
            epochs[chosen], ids[chosen] = drawn.epoch, drawn.id + self._bases[i]
        return Draw(epochs, ids)

    def substitute(self, step: int, index: int, attempt: int) -> int | None:
        """See :meth:`Order.substitute`."""
        source, number = int(self._slots[0][index]), int(self._slots[1][index])
        other = self.orders[source].substitute(step, number, attempt)
        return None if other is None else other + int(self._bases[source])
