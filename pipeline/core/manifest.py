"""The manifest: what a set of shards promises. Format, loading, atomic saving. No torch here.

A data set is a folder (or URL) with plain WebDataset tars, ``manifest.json``, ``sizes.json`` (for open_clip) and one
``SHARD.idx`` beside each tar with the offsets of its members (an npz of plain arrays). The number of a sample, its
``id``, is its place in the concatenation of the shards in the manifest's order.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import DataError

if TYPE_CHECKING:
    import numpy as np

FORMAT = "sluice-manifest"
VERSION = 1
FILE = "manifest.json"


@dataclass(frozen=True)
class Shard:
    """One tar."""

    name: str
    """File name, relative to the manifest's folder."""
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """Where the members of one shard lie. S samples, F fields in the order of ``Manifest.fields``."""

    keys: tuple[str, ...]
    """WebDataset key of each sample (S)."""
    offset: np.ndarray
    """int64[S,F], byte offset of the member's data; -1 where the sample lacks the field."""
    size: np.ndarray
    """int64[S,F], bytes of the member's data; -1 where absent."""


@dataclass(frozen=True)
class Manifest:
    """What a set of shards promises."""

    root: str
    """Folder or URL that holds the shards; not stored in the file."""
    shards: tuple[Shard, ...]
    fields: dict[str, tuple[str, ...]]
    """Field name to the tar extensions that carry it: {"image": ("jpg", "png"), "label": ("cls",)}."""
    classes: tuple[str, ...] = ()
    statistics: dict[str, Any] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    """How it was made: source, options, seed, version."""

    @cached_property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(s.samples for s in self.shards)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Id of each shard's first sample, and the total at the end (one more entry than shards)."""
        return tuple(accumulate((s.samples for s in self.shards), initial=0))

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of what decides the samples and their order; in every checkpoint and every result."""
        facts = {"fields": self.fields, "shards": [(s.name, s.samples, s.sha256) for s in self.shards]}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]

    def as_json(self) -> str:
        """The text of ``manifest.json``: the same manifest gives the same bytes."""
        body = {k: v for k, v in asdict(self).items() if k != "root"}
        head = {"format": FORMAT, "version": VERSION, "samples": self.samples, "fingerprint": self.fingerprint}
        return json.dumps(head | body, indent=1) + "\n"


def parse(text: str, root: str, where: str) -> Manifest:
    """Read a manifest's text.

    Raises:
        DataError: not a manifest, of another version, or with parts missing or changed.
    """
    try:
        body = json.loads(text)
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise DataError(f"{where} is not a manifest; make one with `sluice prep index`")
        if body["version"] != VERSION:
            raise DataError(f"{where} has version {body['version']}, this program reads {VERSION}; rebuild it")
        manifest = Manifest(
            root=root,
            shards=tuple(Shard(**s) for s in body["shards"]),
            fields={k: tuple(v) for k, v in body["fields"].items()},
            classes=tuple(body["classes"]),
            statistics=body["statistics"],
            made=body["made"],
        )
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where} is damaged ({error!r}); rebuild it with `sluice prep index`") from error
    if body["fingerprint"] != manifest.fingerprint:
        raise DataError(f"{where} was changed by hand: its fingerprint does not fit its shards")
    return manifest


def load(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of a local data set.

    Raises:
        DataError: none there, or damaged.
    """
    path = Path(folder) / FILE
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"no manifest at {path} ({error.strerror}); build shards with `sluice prep build`, "
            f"or index existing ones with `sluice prep index {folder}`"
        ) from error
    return parse(text, str(folder), str(path))


def index_name(shard: str) -> str:
    """File name of a shard's index: ``x-000000.tar`` has ``x-000000.idx``."""
    return shard.removesuffix(".tar") + ".idx"
