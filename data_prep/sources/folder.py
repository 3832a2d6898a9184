"""A folder of images: one sub-folder per class, or flat; captions and metadata in files beside the images.

* ``SRC/train/...`` and ``SRC/val/...`` (or ``test``) and nothing else: these are the splits.
* Sub-folders with images, and none at the top: each is a class, named like the folder; deeper folders belong to it.
* ``name.txt`` beside ``name.jpg`` is its caption, ``name.json`` its metadata; the key "caption" of a JSON file is the
  caption where there is no text file.

A sidecar that is no JSON table makes its image a rejected one. Hidden files and folders are skipped. Links are followed
only to what lies inside the source folder.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_prep import places
from data_prep.fetch import Failed
from data_prep.images import EXTENSIONS
from data_prep.places import UrlFile
from data_prep.record import LocalFile, Payload, Record, extension_of, file_stamp, json_table, readable, safe_key
from pipeline.core.errors import DataError

SPLITS = ("train", "val", "test")


class _Found(NamedTuple):
    relative: str
    """Path below the source folder, with "/"."""
    split: str | None
    alone: bool
    """No other image in its folder has the same name before the extension."""
    stamp: str
    sidecars: frozenset[str]
    """Extensions of the files beside it that belong to it."""


@dataclass
class FolderSource:
    """Images in a folder, local or behind a URL."""

    root: str | os.PathLike[str]
    shuffle: bool = True
    """Mix the order, so that shards hold many classes; the listing is held in memory either way."""
    seed: int = 0
    known: Sequence[str] = ()
    """Classes that are numbered already, by the data set that is added to; new ones come after them."""

    positional: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.root = str(self.root).rstrip("/")
        if not places.is_folder(self.root):
            raise DataError(f"no folder at {self.root}")
        self._inside = Path(self.root).resolve()
        self._files = list(self._list())
        if not self._files:
            raise DataError(f"no images in {self.root}; known extensions: {', '.join(EXTENSIONS)}")
        self.total = len(self._files)
        names = {self._class(f) for f in self._files}
        labelled = "" not in names
        new = sorted(names - set(self.known))
        self.classes: tuple[str, ...] = (*self.known, *new) if labelled else ()
        self._number = {name: i for i, name in enumerate(self.classes)}
        if self.shuffle:
            random.Random(self.seed).shuffle(self._files)

    def describe(self) -> dict[str, Any]:
        """See :class:`~data_prep.record.Source`."""
        return {"kind": "folder", "root": self.root, "shuffle": self.shuffle, "seed": self.seed}

    def _list(self) -> Iterator[_Found]:
        files, folders = self._entries("")
        if not files and set(folders) <= set(SPLITS) and "train" in folders:
            for split in folders:
                yield from self._walk(split, split)
        else:
            yield from self._walk("", None)

    def _entries(self, below: str) -> tuple[list[places.Listed], list[str]]:
        """Files and folders that are neither hidden nor links to the outside."""
        folder = f"{self.root}/{below}" if below else str(self.root)
        files, folders = places.listing(folder)
        files = [f for f in files if not f.name.startswith(".") and self._contained(f"{folder}/{f.name}")]
        return files, [name for name in folders if not name.startswith(".")]

    def _walk(self, below: str, split: str | None) -> Iterator[_Found]:
        files, folders = self._entries(below)
        names = {f.name for f in files}
        images = [f for f in files if extension_of(f.name) in EXTENSIONS]
        stems = Counter(_stem(f.name) for f in images)
        prefix = f"{below}/" if below else ""
        for name, stamp in images:
            stem = _stem(name)
            beside = frozenset(e for e in ("txt", "json") if f"{stem}.{e}" in names)
            yield _Found(prefix + name, split, stems[stem] == 1, stamp, beside)
        for name in folders:
            yield from self._walk(prefix + name, split)

    def _contained(self, path: str) -> bool:
        return not os.path.islink(path) or Path(path).resolve().is_relative_to(self._inside)

    def _class(self, found: _Found) -> str:
        """The class's name; empty for an image that is in no class folder."""
        inner = found.relative.removeprefix(f"{found.split}/") if found.split else found.relative
        return readable(inner.partition("/")[0]) if "/" in inner else ""

    def __iter__(self) -> Iterator[Record]:
        for found in self._files:
            path = f"{self.root}/{found.relative}"
            image: Payload = UrlFile(path) if places.is_url(path) else LocalFile(path)
            stamp = found.stamp
            if not stamp and os.path.islink(path) and not os.path.exists(path):
                image, stamp = Failed("a link to nothing"), "broken"
            caption, metadata, sidecars, problem = self._sidecars(_stem(path), found.sidecars)
            name = _stem(found.relative)
            key = safe_key(name) if found.alone else f"{safe_key(name)}~{found.relative[len(name) + 1 :]}"
            yield Record(
                key=key,
                identity=found.relative,
                image=Failed(problem) if problem else image,
                stamp=f"{stamp or file_stamp(path)}{sidecars}",
                label=self._number[self._class(found)] if self.classes else None,
                caption=caption,
                metadata=metadata,
                split=found.split,
                extension=extension_of(found.relative),
            )

    def _sidecars(self, stem: str, there: frozenset[str]) -> tuple[str | None, dict[str, Any] | None, str, str]:
        """Caption, metadata, a stamp of the files they come from, and what is wrong with these."""
        text, table = (_read(f"{stem}.{e}") if e in there else None for e in ("txt", "json"))
        caption = text.strip() if text is not None else None
        metadata, problem = json_table(table) if table is not None else (None, "")
        if metadata is not None and caption is None and isinstance(metadata.get("caption"), str):
            caption = metadata["caption"]
        return caption, metadata, "".join(f"\0{part}" for part in (text, table) if part is not None), problem


def _read(place: str) -> str:
    with places.opened(place) as f:
        return f.read().decode("utf-8", "surrogateescape").replace("\r\n", "\n")


def _stem(name: str) -> str:
    return name[: -len(extension_of(name)) - 1] if extension_of(name) else name
