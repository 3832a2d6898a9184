"""What components may know of the data, from its manifests."""

from __future__ import annotations

from itertools import accumulate

from pipeline.config.schema import Data
from pipeline.core.manifest import Manifest
from pipeline.core.protocols import DataFacts, SetFacts
from pipeline.data.dataset import open_beside


def facts(data: Data, manifest: Manifest) -> DataFacts:
    """Facts of all data sets of a run.

    Args:
        data: geometry, and the data sets beside the first, whose manifests are loaded.
        manifest: of ``data.train``.

    Raises:
        DataError: a data set beside the first has no manifest, or a damaged one.
    """
    manifests = [manifest, *(open_beside(name, beside) for name, beside in data.beside.items())]
    starts = accumulate((m.samples for m in manifests), initial=0)
    # A manifest need not name domains.
    known = [
        SetFacts(m.samples, m.classes, tuple(getattr(m, "domains", ())), start)
        for m, start in zip(manifests, starts, strict=False)
    ]
    first = known[0]
    beside = dict(zip(data.beside, known[1:], strict=True))
    views = tuple(view.shape for view in data.image.each)
    return DataFacts(data.image.shape, first.classes, first.samples, first.domains, beside, views)
