"""Image folders and torchvision's data sets as evaluations read them: as shards, made on the way into the cache.

Images are stored as they are. An entry of the cache is known by names, sizes and times of all files of the source, so
that one that changes is read anew. Data sets that are shards already are used where they lie.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_prep.ahead import cores
from data_prep.build import REJECTS, Counts, build
from data_prep.options import Options
from data_prep.record import Source
from data_prep.sources.folder import FolderSource
from data_prep.sources.layout import split_named
from data_prep.sources.torchvision import TorchvisionSource
from pipeline.config.schema import EvalData
from pipeline.core.cache import VARIABLE, cache_folder, entry
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.location import is_url
from pipeline.core.manifest import FILE, IMAGES, load, load_index
from pipeline.data.access import check_shard

KIND = "data"
"""Folder of the cache."""
VERSION = 1
"""One more whenever other shards are made of the same source."""
SPLIT = "train"
"""Where a build puts what is in no other split."""
_ARGUMENTS = ("split", "image_set", "train")
"""By which torchvision's data sets are told their split."""
Show = Callable[[str, int, int], None]
"""What is made, how many are, of how many."""


def shards_of(data: EvalData, show: Show = lambda what, done, total: None) -> str:
    """The folder of shards of a data set, which are made if there are none. One process at a time makes them.

    Args:
        data: where it lies, and which split.
        show: is told how far that is.

    Raises:
        ConfigError: there is no such split, or it has to be said which.
        DataError: there is no data set, some of its images cannot be used, or there is no room for them.
    """
    folder, root = _place(data)
    if root is None:
        return folder
    if data.torchvision is not None:
        return _kept(data, lambda: _torchvision(data.torchvision or "", folder, data.split), root, show)
    return _kept(data, lambda: _folder(root), root, show)


def shards_there(data: EvalData) -> str | None:
    """The folder of shards of a data set that is some already; None: they are to be made. Nothing is read.

    Raises:
        ConfigError: there is no such split, or it has to be said which.
        DataError: there is no such folder.
    """
    folder, root = _place(data)
    return folder if root is None else None


def _place(data: EvalData) -> tuple[str, Path | None]:
    """The folder of shards, and None; or where images lie of which they are to be made."""
    place = data.path.rstrip("/") or "/"
    if data.torchvision is not None:
        if not Path(place).is_dir():
            raise DataError(f"no folder at {place}")
        return place, Path(place)
    if data.split is not None and (_is_built(f"{place}/{data.split}") or is_url(place)):
        return f"{place}/{data.split}", None
    if is_url(place) or place.endswith(".tar") or _is_built(place) or not Path(place).is_dir():
        if data.split is not None:
            raise ConfigError(f"split = {data.split!r}: {place} is one data set; name the folder of the split itself")
        return data.path, None
    root = _split_folder(Path(place), data.split)
    # What is said of a folder without a manifest fits one without images.
    return (str(root), root) if _has_images(root) else (data.path, None)


def _is_built(place: str) -> bool:
    return Path(place, FILE).is_file()


def _split_folder(root: Path, split: str | None) -> Path:
    """The folder of a split, where there are some."""
    below = sorted(p for p in root.iterdir() if p.is_dir() and p.name[0] != ".")
    splits = {p: named for p in below if (named := split_named(p.name))}
    if split is not None:
        found = [p for p in below if p.name == split] or [p for p, named in splits.items() if named == split]
        if len(found) != 1:
            there = ", ".join(p.name for p in splits) or "none"
            raise ConfigError(
                f"split = {split!r}: {root} has {len(found) or 'no'} such folders; its splits are {there}"
            )
        return found[0]
    if splits and len(splits) == len(below):
        names = ", ".join(p.name for p in below)
        raise ConfigError(
            f"{root} has splits ({names}); say which: {{path = {str(root)!r}, split = {splits[below[0]]!r}}}"
        )
    return root


def _has_images(root: Path) -> bool:
    return any(name.lower().rpartition(".")[2] in IMAGES for _, _, names in os.walk(root) for name in names)


def _folder(root: Path) -> Source:
    try:
        return FolderSource(root)
    except (DataError, ConfigError) as error:
        raise DataError(
            f"{error}; what --layout says can be said to `sluice prep build folder`, whose shards can be named here"
        ) from error


def _torchvision(name: str, root: str, split: str | None) -> Source:
    """A split by its name, through the argument that the data set takes it by."""
    from torchvision import datasets

    taken: Any = inspect.signature(kind).parameters if (kind := getattr(datasets, name, None)) else {}
    by = next((a for a in _ARGUMENTS if a in taken), None)
    if kind is not None and (split is None) != (by is None):
        raise ConfigError(
            f"torchvision's {name} has splits; say which by split = ..."
            if split is None
            else f"split = {split!r}: torchvision's {name} has no splits"
        )
    arguments: dict[str, Any] = {} if by is None else {by: split}
    if by == "train":
        if split not in ("train", "test", "val"):
            raise ConfigError(f"split = {split!r}: torchvision's {name} has 'train' and 'test'")
        arguments = {by: split == "train"}
    return TorchvisionSource(name, root, {SPLIT: arguments})


def _kept(data: EvalData, source: Callable[[], Source], root: Path, show: Show) -> str:
    """The shards of a source in the cache."""
    files = sorted(_files(root))
    asked = [VERSION, str(root.resolve()), data.torchvision, data.split if data.torchvision else None, files]
    mark = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]

    def fill(folder: Path) -> None:
        _check_room(sum(size for _, size, _ in files), folder, root)
        _build(source(), folder, root, show)

    found = entry(KIND, mark, fill, _is_whole, lambda folder: show(f"{root}, by another process", 0, 1))
    return str(found / SPLIT)


def _files(root: Path) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of change of every file."""
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            try:
                facts = os.stat(path)
            except FileNotFoundError:
                continue
            yield os.path.relpath(path, root), facts.st_size, facts.st_mtime_ns


def _check_room(size: int, folder: Path, root: Path) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DataError(
            f"{root} holds {size / 1e9:.3g} GB, and the cache {cache_folder(KIND)} has room for {free / 1e9:.3g} GB; "
            f"set {VARIABLE} to another folder, or build shards with `sluice prep build` and name them"
        )


def _build(source: Source, folder: Path, root: Path, show: Show) -> None:
    """All of a source as one split; images that cannot be used are no part of a data set that is measured."""

    def progress(counts: Counts) -> None:
        if counts.inputs % 100 == 0 or counts.inputs == source.total:
            show(f"reading {root}", counts.inputs, max(source.total or 0, counts.inputs))

    workers = cores() if (source.total or 0) > 10_000 else 0
    built = build(source, folder, Options(splits={}, workers=workers), progress=progress)
    if built.counts.rejects:
        first = json.loads((folder / REJECTS).read_text().partition("\n")[0])
        raise DataError(
            f"{built.counts.rejects} of {built.counts.inputs} images of {root} cannot be used, first "
            f"{first['key']}: {first['reason']}; mend or remove them, or leave them out with `sluice prep build`, "
            "whose shards can be named here"
        )


def _is_whole(folder: Path) -> bool:
    """All shards and indexes are there and as large as they were; what is in them is checked when it is read."""
    try:
        manifest = load(folder / SPLIT)
        for shard in manifest.shards:
            check_shard(manifest, shard)
            load_index(manifest, shard)
    except DataError:
        return False
    return True
