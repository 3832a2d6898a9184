"""Existing WebDataset tars, repacked: filtered, re-encoded, split and dealt out into new shards.

To use tars as they are, ``sluice prep index`` is enough. Where a tar is damaged, the samples before the damage
(but the last, which may be half) are taken, and the rest is one rejected input that says what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from data_prep import places
from data_prep.fetch import Failed
from data_prep.record import Inline, Payload, Record, json_table, number_classes, readable, safe_key
from data_prep.shards import field_of
from data_prep.ustar import NAME_LENGTH, Member
from data_prep.walk import Damage, Parts, group, walk
from pipeline.core.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a file."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes. A tar that vanished stops the build: OSError passes through."""
        with open(self.path, "rb") as f:
            f.seek(self.offset)
            return f.read(self.size)


@dataclass
class TarsSource:
    """Samples of tars; those behind URLs are copied here one at a time, once to count and once to read."""

    tars: Sequence[str | Path]
    label: Literal["cls", "folder", "none"] = "cls"
    """Labels are in ``.cls`` members, or are the first folder in the key."""
    known: Sequence[str] = ()
    """Classes that are numbered already; new ones come after them."""
    classes: tuple[str, ...] = field(default=(), init=False)
    total: int | None = field(default=None, init=False)
    positional: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.label not in ("cls", "folder", "none"):
            raise ConfigError(f"labels come from cls, folder or none, not {self.label!r}")
        self._paths = [p for tar in self.tars for p in _expand(str(tar))]
        names: set[str] = set()
        self.total = 0
        for path in self._paths:
            with places.local(path) as here:
                for key, members, _ in _samples(here):
                    self.total += 1
                    if members is not None and (name := self._label(here, key, members)):
                        names.add(name)
        self.classes, self._number = number_classes(names, self.known)

    def describe(self) -> dict[str, Any]:
        """See :class:`~data_prep.record.Source`."""
        return {"kind": "tars", "tars": self._paths, "label": self.label}

    def _label(self, path: str, key: str, members: Sequence[Member]) -> str:
        if self.label == "folder":
            return readable(key.partition("/")[0]) if "/" in key else ""
        found = [m for m in members if m.extension == "cls"] if self.label == "cls" else []
        return _read(path, found[0]).decode("utf-8", "replace").strip() if found else ""

    def __iter__(self) -> Iterator[Record]:
        for number, place in enumerate(self._paths):
            stamp = places.stamp(place)
            with places.local(place) as path:
                for key, members, problem in _samples(path):
                    unique = f"{number:05d}/{safe_key(key)}"
                    if members is None:
                        yield Record(unique, f"{place}: {key}", Failed(problem), problem)
                        continue
                    record = self._record(path, key, unique, members, stamp)
                    if path != place and isinstance(record.image, Slice):  # the copy does not outlive this loop
                        record = replace(record, image=Inline(record.image.read()))
                    yield record

    def _record(self, path: str, key: str, unique: str, members: Sequence[Member], stamp: str) -> Record:
        image: Payload | None = None
        problem, more = "", dict[str, bytes]()
        caption: str | None = None
        metadata: dict[str, Any] | None = None
        for m in members:
            kind = field_of(m.extension)
            if kind == "image" and image is None:
                image = Slice(path, m.offset, m.size)
            elif kind == "caption":
                caption = _read(path, m).decode("utf-8", "replace")
            elif kind == "metadata":
                metadata, wrong = json_table(_read(path, m))
                problem = problem or wrong
            elif kind != "label":
                problem = problem or _unfit(f"{unique}.{m.extension}")
                more[m.extension] = _read(path, m)
        if image is None:
            problem = f"no image, only {', '.join(m.extension for m in members)}"
        label = self._number.get(self._label(path, key, members))
        payload = Failed(problem) if problem or image is None else image
        first = members[0].offset
        return Record(unique, key, payload, f"{stamp} {first}", label, caption, more, metadata)


def _unfit(name: str) -> str:
    """Why a file of this name cannot be written; empty when it can."""
    try:
        return "" if len(name.encode()) <= NAME_LENGTH else f"name too long for a tar's header: {name}"
    except UnicodeEncodeError:
        return f"name that is not UTF-8: {name!r}"


def _expand(text: str) -> list[str]:
    """A tar, a folder with tars in it or in its sub-folders, or a pattern with braces."""
    from braceexpand import braceexpand

    if places.is_folder(text):
        return [f"{text.rstrip('/')}/{name}" for name in places.tars(text)]
    paths = list(braceexpand(text))
    for path in paths:
        if not places.exists(path):
            raise DataError(f"no tar at {path}")
    return paths


def _samples(path: str) -> Iterator[tuple[str, list[Member] | None, str]]:
    """Key and members of each sample, from the headers alone; at damage, no members and what is wrong."""
    with open(path, "rb", buffering=0) as f:
        try:
            for key, members in group(walk(Parts(f), check=False)):
                yield key, members, ""
        except Damage as damage:
            yield "~damage", None, f"the rest of the tar is lost: {damage}"


def _read(path: str, member: Member) -> bytes:
    return Slice(path, member.offset, member.size).read()
