"""Existing WebDataset tars, repacked: filtered, re-encoded, split and dealt out into new shards.

To use tars as they are, ``sluice prep index`` is enough. Where a tar is damaged, the samples before the damage
(but the last, which may be half) are taken, and the rest is one rejected input that says what is wrong.

Beside a manifest with classes the digits in ``.cls`` are numbers among these, and the samples keep the classes' names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from data_prep import places
from data_prep.dataset import Manifests
from data_prep.fetch import Failed
from data_prep.labels import NONE_KNOWN, Classes, Known, Label, cell_label, named
from data_prep.record import Inline, Payload, Record, captions_of, safe_key
from data_prep.scan import counted
from data_prep.shards import field_of
from data_prep.text import decoded, json_table
from data_prep.ustar import NAME_LENGTH, Member
from data_prep.walk import Damage, Files, Parts, group, walk
from pipeline.core.classes import union
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.location import expand, join


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
    known: Known = NONE_KNOWN
    image: str = ""
    """Extension of the member that is the image ("input.jpg"); left out: the first that has an image's."""
    caption: str = ""
    """Key of the metadata whose text is the caption; left out: the ``.txt`` member is."""
    classes: tuple[str, ...] = field(default=(), init=False)
    total: int | None = field(default=None, init=False)
    passed: Counter[str] = field(default_factory=Counter[str], init=False)
    """How many files of which kinds belong to no sample."""
    positional: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.label not in ("cls", "folder", "none"):
            raise ConfigError(f"labels come from cls, folder or none, not {self.label!r}")
        self._paths = [p for tar in self.tars for p in _expand(str(tar))]
        # Classes that the labels of each tar count in: those of its folder's manifest.
        manifests = Manifests()
        self._lists = {p: manifests.of(p) for p in self._paths if self.label == "cls"}
        labels: set[Label] = set()
        self.total = 0
        for place in self._paths:
            with places.local(place) as here:
                for key, members, _ in _samples(here, self.passed):
                    self.total += 1
                    label = self._label(place, here, key, members or ())
                    if isinstance(label, Label):
                        labels.add(label)
        names = union({m.root: m.classes for m in self._lists.values() if m}.items())
        self._classes = Classes(labels, self.known, names)
        self.classes = self._classes.names

    def describe(self) -> dict[str, Any]:
        """See :class:`~data_prep.record.Source`."""
        asked = {name: value for name, value in (("image", self.image), ("caption", self.caption)) if value}
        return {"kind": "tars", "tars": self._paths, "label": self.label, **asked}

    def _label(self, place: str, path: str, key: str, members: Sequence[Member]) -> Label | str | None:
        """The label of a sample in a tar whose copy here is ``path``; why there is none, or None for no word of it."""
        if self.label == "folder":
            return named(key.partition("/")[0]) if "/" in key else None
        found = [m for m in members if m.extension == "cls"] if self.label == "cls" else []
        if not found:
            return None
        manifest = self._lists[place]
        return cell_label(_read(path, found[0]), manifest.classes if manifest else ())

    def __iter__(self) -> Iterator[Record]:
        for number, place in enumerate(self._paths):
            stamp = places.stamp(place)
            with places.local(place) as path:
                for key, members, problem in _samples(path, Counter()):
                    unique = f"{number:05d}/{safe_key(key)}"
                    if members is None:
                        yield Record(unique, f"{place}: {key}", Failed(problem), problem)
                        continue
                    record = self._record(path, key, unique, members, self._label(place, path, key, members))
                    record = replace(record, stamp=f"{stamp} {members[0].offset}")
                    if path != place and isinstance(record.image, Slice):  # the copy does not outlive this loop
                        record = replace(record, image=Inline(record.image.read()))
                    yield record

    def _record(self, path: str, key: str, unique: str, members: Sequence[Member], label: Label | str | None) -> Record:
        chosen = self._image(members)
        number, wrong = self._classes.look_up(label)
        problems = [wrong] if wrong else []
        if chosen is None:
            problems.append(self._no_image(members))
        more = dict[str, bytes]()
        caption: str | None = None
        metadata: dict[str, Any] | None = None
        for m in members:
            kind = field_of(m.extension)
            if kind == "caption":
                try:
                    caption = decoded(_read(path, m))
                except ValueError as error:
                    problems.append(f".{m.extension} is {error}")
            elif kind == "metadata":
                metadata, wrong = json_table(_read(path, m))
                problems += [wrong] if wrong else []
            elif kind != "label" and m is not chosen:
                wrong = _unfit(f"{unique}.{m.extension}")
                problems += [wrong] if wrong else []
                more[m.extension] = _read(path, m)
        if self.caption:
            caption, further, wrong = self._caption(caption, metadata or {})
            twice = [f"two captions .{extension}" for extension in further if extension in more]
            problems += [wrong] if wrong else twice
            more |= further
        image: Payload = Slice(path, chosen.offset, chosen.size) if chosen else Failed("")
        payload = Failed(problems[0]) if problems else image
        return Record(unique, key, payload, "", number, caption, more, metadata)

    def _caption(self, text: str | None, metadata: Mapping[str, Any]) -> tuple[str | None, dict[str, bytes], str]:
        """The caption in the metadata, further members with captions, and what is wrong. A .txt member is kept."""
        texts = captions_of(metadata.get(self.caption))
        caption = texts.pop("txt", None)
        further = {**texts, **({"original.txt": text} if text is not None else {})}
        wrong = "" if caption else f"no text under {self.caption!r} in the metadata"
        return caption, {extension: t.encode("utf-8", "replace") for extension, t in further.items()}, wrong

    def _image(self, members: Sequence[Member]) -> Member | None:
        """The member that is the image."""
        if self.image:
            return next((m for m in members if m.extension == self.image), None)
        return next((m for m in members if field_of(m.extension) == "image"), None)

    def _no_image(self, members: Sequence[Member]) -> str:
        if self.image:
            return f"no .{self.image}, only {', '.join(m.extension for m in members)}"
        alike = [m.extension for m in members if field_of(m.extension.rpartition(".")[2]) == "image"]
        hint = f"; --image-field {alike[0]} would take that one" if alike else ""
        return f"no image, only {', '.join(m.extension for m in members)}{hint}"


def _unfit(name: str) -> str:
    """Why a file of this name cannot be written; empty when it can."""
    try:
        return "" if len(name.encode()) <= NAME_LENGTH else f"name too long for a tar's header: {name}"
    except UnicodeEncodeError:
        return f"name that is not UTF-8: {name!r}"


def _expand(text: str) -> list[str]:
    """A tar, a folder with tars in it or in its sub-folders, or a pattern with braces for several of these."""
    if places.is_folder(text):
        return [join(text, name) for name in places.tars(text)]
    paths = list[str]()
    for path in [text] if places.exists(text) else expand(text):  # names may hold braces
        if not places.exists(path):
            raise DataError(f"no tar at {path}")
        paths += _expand(path) if places.is_folder(path) else [path]
    return paths


def _samples(path: str, passed: Counter[str]) -> Iterator[tuple[str, list[Member] | None, str]]:
    """Key and members of each sample, from the headers alone; at damage, no members and what is wrong."""
    found, here = False, Counter[str]()
    with open(path, "rb", buffering=0) as f:
        try:
            data = Parts(f)
            for key, members in group(walk(data, False, here, Files(data)), here):
                found = True
                yield key, members, ""
        except Damage as damage:
            yield "~damage", None, f"the rest of the tar is lost: {damage}"
            found = True
    here = +Counter({kind: times for kind, times in here.items() if kind})
    if here and not found:
        yield "~nothing", None, f"no samples, only {counted(here)}: files are named like 0001.jpg"
    passed.update(here)


def _read(path: str, member: Member) -> bytes:
    return Slice(path, member.offset, member.size).read()
