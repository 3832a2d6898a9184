"""A folder of images: one sub-folder per class, or flat; captions and metadata in files beside the images.

* What the folders mean, splits, classes or neither, is decided in ``layout.py``.
* ``name.txt`` beside ``name.jpg`` is its caption, ``name.json`` its metadata; the key "caption" of a JSON file (or
  another that is asked for) is the caption where there is no text file.

A sidecar that is no JSON table makes its image a rejected one. Hidden files and folders are skipped; other files that
are neither images by their names nor sidecars are counted (``others``). Links to files inside the source folder are
followed; those to other files and to folders only if that is asked for, and are rejected if not.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_prep import places
from data_prep.fetch import Failed
from data_prep.labels import NONE_KNOWN, Classes, Known, Label, named
from data_prep.places import UrlFile
from data_prep.record import LocalFile, Payload, Record, captions_of, extension_of, file_stamp, safe_key
from data_prep.sources.layout import Asked, layout_of
from data_prep.text import decoded, json_table
from pipeline.core.errors import DataError
from pipeline.core.location import join
from pipeline.core.manifest import FIELDS

_SYSTEM = ("__MACOSX", "@eaDir", "lost+found")
"""Folders that archives and file systems leave, with no images of the user's."""


class _Found(NamedTuple):
    relative: str
    """Path below the source folder, with "/"."""
    alone: bool
    """No other image in its folder has the same name before the extension."""
    stamp: str
    sidecars: frozenset[str]
    """Extensions of the files beside it that belong to it."""
    problem: str = ""
    """Why it is rejected without being read."""


@dataclass
class FolderSource:
    """Images in a folder, local or behind a URL."""

    root: str | os.PathLike[str]
    shuffle: bool = True
    """Mix the order, so that shards hold many classes; the listing is held in memory either way."""
    seed: int = 0
    known: Known = NONE_KNOWN
    links: bool = False
    """Follow all links, not only those to files inside ``root``."""
    layout: Asked = "auto"
    """What the folders at the top are: splits, classes, or neither (flat)."""
    caption: str = "caption"
    """Key of the JSON files that holds the caption."""

    positional: bool = field(default=False, init=False)
    others: Counter[str] = field(default_factory=Counter[str], init=False)
    """Files that are neither images nor beside one, by extension."""

    def __post_init__(self) -> None:
        self.root = str(self.root).rstrip("/")
        if not places.is_folder(self.root):
            raise DataError(f"no folder at {self.root}")
        self._inside = _real(str(self.root))
        self._files = list(self._walk("", ()))
        found = [f for f in self._files if not f.problem]
        if not found:
            hint = "".join(f", only {f.relative}, {f.problem}" for f in self._files[:1])
            raise DataError(f"no images in {self.root}{hint or '; known extensions: ' + ', '.join(FIELDS['image'])}")
        self.total = len(self._files)
        self._layout = layout_of([f.relative for f in found], self.layout)
        self._files = [f if f.problem else f._replace(problem=self._layout.place(f.relative)[1]) for f in self._files]
        self._classes = Classes({label for f in self._files if (label := self._label(f))}, self.known)
        self.classes: tuple[str, ...] = self._classes.names
        if self.shuffle:
            random.Random(self.seed).shuffle(self._files)

    def describe(self) -> dict[str, Any]:
        """See :class:`~data_prep.record.Source`."""
        facts = {"kind": "folder", "root": self.root, "shuffle": self.shuffle, "seed": self.seed, "links": self.links}
        asked = {"layout": (self.layout, "auto"), "caption": (self.caption, "caption")}
        return facts | {name: value for name, (value, default) in asked.items() if value != default}

    def _entries(self, below: str) -> tuple[list[places.Listed], list[str]]:
        """Files and folders that are not hidden."""
        files, folders = places.listing(self._path(below))
        return [f for f in files if f.name[0] != "."], [f for f in folders if f[0] != "." and f not in _SYSTEM]

    def _path(self, below: str) -> str:
        return join(str(self.root), below) if below else str(self.root)

    def _walk(self, below: str, above: tuple[Path, ...]) -> Iterator[_Found]:
        """The images below a folder; ``above`` are the folders that led to it, without links."""
        files, folders = self._entries(below)
        prefix = f"{below}/" if below else ""
        above = (*above, _real(self._path(below)))
        problems = {f.name: self._refused(prefix + f.name, above) for f in files}
        images = [f for f in files if extension_of(f.name) in FIELDS["image"]]
        stems = Counter(_stem(f.name) for f in images)
        sidecars = {f"{stem}.{e}" for stem in stems for e in ("txt", "json")} & problems.keys()
        others = problems.keys() - sidecars - {f.name for f in images}
        self.others.update(extension_of(name) for name in others)
        for name, stamp in images:
            stem = _stem(name)
            beside = [e for e in ("txt", "json") if f"{stem}.{e}" in sidecars]
            its = [f".{e} is {problems[f'{stem}.{e}']}" for e in beside if problems[f"{stem}.{e}"]]
            problem = problems[name] or " and ".join(its)
            yield _Found(prefix + name, stems[stem] == 1, stamp, frozenset(beside), problem)
        for name in folders:
            yield from self._inner(prefix + name, above)

    def _inner(self, below: str, above: tuple[Path, ...]) -> Iterator[_Found]:
        """What is in a folder; a link that is not followed is a rejected input."""
        problem = self._refused(below, above)
        if problem:
            yield _Found(below, False, "", frozenset(), problem)
        else:
            yield from self._walk(below, above)

    def _refused(self, below: str, above: tuple[Path, ...]) -> str:
        """Why a link is not followed; empty for what is none."""
        path = self._path(below)
        if not os.path.islink(path):
            return ""
        target = _real(path)
        if not target.exists():
            return "a link to nothing"
        if any(folder.is_relative_to(target) for folder in above):
            return "a link to a folder that it is in"
        if self.links:
            return ""
        if target.is_dir():
            return "a link to a folder; --links follows it"
        return "" if target.is_relative_to(self._inside) else "a link to outside of the source; --links follows it"

    def _label(self, found: _Found) -> Label | None:
        """The label of an image; None of one that is in no class folder."""
        name = "" if found.problem else self._layout.place(found.relative)[0]
        return named(name) if name else None

    def __iter__(self) -> Iterator[Record]:
        for found in self._files:
            path = self._path(found.relative)
            caption, metadata, sidecars, problem = self._sidecars(_stem(found.relative), found)
            image: Payload = UrlFile(path) if places.is_url(path) else LocalFile(path)
            name = _stem(found.relative)
            label, wrong = self._classes.look_up(self._label(found))
            problem = problem or wrong
            key = safe_key(name) if found.alone else f"{safe_key(name)}~{found.relative[len(name) + 1 :]}"
            yield Record(
                key=key,
                identity=found.relative,
                image=Failed(problem) if problem else image,
                stamp=found.problem or f"{found.stamp or file_stamp(path)}{sidecars}",
                label=label,
                caption=caption,
                metadata=metadata,
                split=self._layout.split(found.relative),
            )

    def _sidecars(self, stem: str, found: _Found) -> tuple[str | None, dict[str, Any] | None, str, str]:
        """Caption, metadata, a stamp of the files they come from, and what is wrong with these or the image."""
        if found.problem:
            return None, None, "", found.problem
        text, table = (_read(self._path(f"{stem}.{e}")) if e in found.sidecars else None for e in ("txt", "json"))
        metadata, problem = json_table(table) if table is not None else (None, "")
        caption = None
        try:
            caption = decoded(text).strip() if text is not None else None
        except ValueError as error:
            problem = problem or f".txt is {error}"
        if metadata is not None and caption is None:
            caption = captions_of(metadata.get(self.caption)).get("txt")
        stamp = "".join(f"\0{p.decode('utf-8', 'surrogateescape')}" for p in (text, table) if p is not None)
        return caption, metadata, stamp, problem


def _real(path: str) -> Path:
    """Where a path leads; unlike Path.resolve not an error for a link to itself."""
    return Path(os.path.realpath(path))


def _read(place: str) -> bytes:
    with places.opened(place) as f:
        return f.read()


def _stem(name: str) -> str:
    return name[: -len(extension_of(name)) - 1] if extension_of(name) else name
