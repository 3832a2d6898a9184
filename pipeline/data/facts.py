"""What components may know of the data, from its manifests."""

from __future__ import annotations

from itertools import accumulate

from pipeline.config.data import Data, Source
from pipeline.core.manifest import Manifest
from pipeline.core.protocols import DataFacts, SetFacts
from pipeline.data.dataset import open_beside
from pipeline.data.outputs import KIND, facts_of
from pipeline.data.selection import sources


def facts(data: Data, manifest: Manifest) -> DataFacts:
    """Facts of all data sets of a run.

    Args:
        data: geometry, and the data sets beside the first, whose manifests are loaded.
        manifest: of ``data.train``.

    Raises:
        DataError: a data set beside the first has no manifest, or a damaged one.
        ConfigError: a field of stored outputs has no sidecar that holds any.
    """
    manifests = [manifest, *(open_beside(name, beside) for name, beside in data.beside.items())]
    starts = accumulate((m.samples for m in manifests), initial=0)
    paths = [data.train, *(beside.path for beside in data.beside.values())]
    first, *others = [_set(*known) for known in zip(manifests, paths, starts, strict=False)]
    return DataFacts(
        data.image.shape,
        first.classes,
        first.samples,
        first.domains,
        dict(zip(data.beside, others, strict=True)),
        tuple(view.shape for view in data.image.each),
        first.sources,
        {
            name: facts_of(manifest, component.settings.get("sidecar", name), f"data.field.{name}")
            for name, component in data.field.items()
            if component.name == KIND
        },
    )


def _set(manifest: Manifest, path: str | tuple[Source, ...], first: int) -> SetFacts:
    """Facts of one data set, whose first sample has the id ``first``."""
    parts = sources(manifest)
    given = [None] * len(parts) if isinstance(path, str) else [source.domain for source in path]
    names = [name or domain_of(part) for name, part in zip(given, parts, strict=True)]
    domains = tuple(dict.fromkeys(names))
    begins = accumulate((part.samples for part in parts), initial=first)
    numbered = tuple((begin, domains.index(name)) for begin, name in zip(begins, names, strict=False))
    return SetFacts(manifest.samples, manifest.classes, domains, first, numbered)


def domain_of(manifest: Manifest) -> str:
    """What the samples of a data set are called where several domains meet: "pacs/art" of pacs/art/train."""
    folders = [part for part in manifest.root.split("/") if part and part != "."]
    return manifest.domain or "/".join(folders[-2:])
