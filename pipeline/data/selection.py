"""A selection: samples of a data set, numbered anew, with what is joined to them by key. No torch here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pipeline.core.manifest import Joined, Manifest
from pipeline.data.order import Ints


@dataclass(frozen=True)
class Side:
    """What is joined to the samples of a data set."""

    manifest: Manifest
    rows: Ints
    """int64[N], for each of the samples its number in ``manifest``; -1 where it has none."""


@dataclass(frozen=True)
class Selection(Manifest):
    """Some of the samples of a data set, with what is joined to them. Fields of sidecars are called "NAME:field"."""

    whole: Manifest = field(kw_only=True)
    kept: Ints = field(kw_only=True, compare=False, repr=False)
    """int64[N], ascending: numbers in ``whole``."""
    sides: Mapping[str, Side] = field(kw_only=True, compare=False, repr=False)
    chosen: Mapping[str, Any] = field(kw_only=True)
    """What decides the samples, and what is joined: plain values for the state of a stream."""

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the samples, their order, and all that is joined."""
        digest = hashlib.sha256(self.whole.fingerprint.encode())
        digest.update(self.kept.astype("<i8").tobytes())
        for name, side in sorted(self.sides.items()):
            digest.update(f"{name} {side.manifest.fingerprint}".encode() + side.rows.astype("<i8").tobytes())
        return digest.hexdigest()[:32]


def identity(manifest: Manifest) -> dict[str, Any]:
    """All that fixes the samples of a data set, for the state of a stream."""
    chosen = manifest.chosen if isinstance(manifest, Selection) else {}
    return {"manifest": manifest.fingerprint} | dict(chosen)


def sources(manifest: Manifest) -> Sequence[Manifest]:
    """The sources of a data set that is mixed of several, or itself."""
    return manifest.parts if isinstance(manifest, Joined) else (manifest,)


def read_sets(manifest: Manifest) -> Iterator[Manifest]:
    """Every data set whose shards are read: sources, and their sidecars."""
    for part in sources(manifest):
        yield part
        if isinstance(part, Selection):
            yield from (side.manifest for side in part.sides.values())
