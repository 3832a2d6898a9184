"""A folder of images: one sub-folder per class, or flat; captions and metadata in files beside the images.

* ``SRC/train/...`` and ``SRC/val/...`` (or ``test``) and nothing else: these are the splits.
* Sub-folders with images, and none at the top: each is a class, named like the folder; deeper folders belong to it.
* ``name.txt`` beside ``name.jpg`` is its caption, ``name.json`` its metadata; the key "caption" of a JSON file is the
  caption where there is no text file.

Hidden files and folders are skipped. Links are followed only to what lies inside the source folder.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.images import EXTENSIONS
from data_prep.record import LocalFile, Record, extension_of, file_stamp, safe_key
from pipeline.core.errors import DataError

SPLITS = ("train", "val", "test")


class _Found(NamedTuple):
    relative: str
    """Path below the source folder, with "/"."""
    split: str | None
    alone: bool
    """No other image in its folder has the same name before the extension."""


@dataclass
class FolderSource:
    """Images in a local folder."""

    root: str | Path
    shuffle: bool = True
    """Mix the order, so that shards hold many classes; the listing is held in memory either way."""
    seed: int = 0
    known: Sequence[str] = ()
    """Classes that are numbered already, by the data set that is added to; new ones come after them."""

    positional: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.root = Path(self.root)
        if not self.root.is_dir():
            raise DataError(f"no folder at {self.root}")
        self._inside = self.root.resolve()
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
        return {"kind": "folder", "root": str(self.root), "shuffle": self.shuffle, "seed": self.seed}

    def _list(self) -> Iterator[_Found]:
        top = [e.name for e in os.scandir(self.root) if not e.name.startswith(".")]
        if top and set(top) <= set(SPLITS) and "train" in top:
            for split in sorted(top):
                yield from self._walk(split, split)
        else:
            yield from self._walk("", None)

    def _walk(self, below: str, split: str | None) -> Iterator[_Found]:
        assert isinstance(self.root, Path)
        with os.scandir(self.root / below) as entries:
            names = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
        images = [e for e in names if extension_of(e.name) in EXTENSIONS and not e.is_dir()]
        stems = Counter(_stem(e.name) for e in images)
        prefix = f"{below}/" if below else ""
        for e in images:
            if not e.is_symlink() or self._contained(e.path):
                yield _Found(prefix + e.name, split, stems[_stem(e.name)] == 1)
        for e in names:
            if e.is_dir(follow_symlinks=False):
                yield from self._walk(prefix + e.name, split)

    def _contained(self, path: str) -> bool:
        return Path(path).resolve().is_relative_to(self._inside)

    def _class(self, found: _Found) -> str:
        """The class's name; empty for an image that is in no class folder."""
        inner = found.relative.removeprefix(f"{found.split}/") if found.split else found.relative
        return inner.partition("/")[0] if "/" in inner else ""

    def __iter__(self) -> Iterator[Record]:
        assert isinstance(self.root, Path)
        for found in self._files:
            path = self.root / found.relative
            stem = path.with_name(_stem(path.name))
            caption, metadata, sidecars = self._sidecars(stem)
            name = _stem(found.relative)
            key = safe_key(name) if found.alone else f"{safe_key(name)}~{found.relative[len(name) + 1 :]}"
            yield Record(
                key=key,
                identity=found.relative,
                image=LocalFile(str(path)),
                stamp=f"{file_stamp(path)}{sidecars}",
                label=self._number[self._class(found)] if self.classes else None,
                caption=caption,
                metadata=metadata,
                split=found.split,
                extension=extension_of(found.relative),
            )

    def _sidecars(self, stem: Path) -> tuple[str | None, dict[str, Any] | None, str]:
        """Caption, metadata, and a stamp of the files they come from."""
        text, table = _read(Path(f"{stem}.txt")), _read(Path(f"{stem}.json"))
        caption, metadata = (text.strip() if text is not None else None), None
        if table is not None:
            try:
                metadata = json.loads(table)
            except json.JSONDecodeError as error:
                raise DataError(f"{stem}.json is not JSON ({error}); mend or remove it") from error
            if not isinstance(metadata, dict):
                raise DataError(f"{stem}.json holds no table ({{...}}); mend or remove it")
            if caption is None and isinstance(metadata.get("caption"), str):
                caption = metadata["caption"]
        return caption, metadata, "".join(f"\0{part}" for part in (text, table) if part is not None)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return None


def _stem(name: str) -> str:
    return name[: -len(extension_of(name)) - 1] if extension_of(name) else name
