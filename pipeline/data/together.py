"""Several data sets in one batch, side by side: labelled and unlabelled images, for example."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from pipeline.data.assemble import Assembler, Bad, Filled
from pipeline.data.field import Arrays, Column


class Together:
    """Fills a micro-batch from several assemblers, each with its own columns; see :class:`Assembler`.

    Args:
        parts: prefix of the columns to assembler; their plans have micro-batches of the size of the first one's, times
            their ratio.
        ratios: prefix to samples for each of the first part's; where there are several, columns are [B,ratio,...].
    """

    def __init__(self, parts: Mapping[str, Assembler], ratios: Mapping[str, int]) -> None:
        self._parts, self._ratios = dict(parts), dict(ratios)
        self.reading = next(iter(self._parts.values())).reading
        self.columns = {
            prefix + name: Column(c.dtype, (ratios[prefix], *c.shape)) if ratios[prefix] > 1 else c
            for prefix, part in parts.items()
            for name, c in part.columns.items()
        }

    def expect(self, number: int) -> None:
        """See :class:`pipeline.data.assemble.Filler`."""
        for part in self._parts.values():
            part.expect(number)

    def fill(self, number: int, arrays: Arrays) -> Filled:
        """See :meth:`Assembler.fill`. Ids go on where those of the part before end."""
        samples, base = 0, 0
        bad: list[Bad] = []
        events: Counter[str] = Counter()
        for prefix, part in self._parts.items():
            ratio = self._ratios[prefix]
            rows = {name: arrays[prefix + name].reshape(-1, *column.shape) for name, column in part.columns.items()}
            filled = part.fill(number, rows)
            rows["id"][: filled.samples] += base
            bad += [replace(b, id=b.id + base, substitute=b.substitute + base) for b in filled.bad]
            events.update(filled.events)
            samples, base = filled.samples // ratio, base + part.samples
        return Filled(samples, bad, events)

    def close(self) -> None:
        """Release files."""
        for part in self._parts.values():
            part.close()
