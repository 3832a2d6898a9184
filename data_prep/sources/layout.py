"""What the folders of a source mean: splits, classes, or neither.

* Folders named like splits (train, Training, val, valid, validation, dev, test2017, ...) and no others: splits.
* Other folders: each is a class, named like the folder; deeper folders belong to it.
* The numbered folders that img2dataset writes (``00000/000000012.jpg``), and images at the top alone: no classes.

Fewer images beside such folders than there are folders were left there, and are rejected. Whatever could mean two
things is refused, and ``--layout`` says which of them.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipeline.core.classes import shown
from pipeline.core.errors import ConfigError, DataError

Asked = Literal["auto", "splits", "classes", "flat"]
SPLITS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "develop", "development", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
"""Usual names of splits."""
_ORNAMENT = re.compile(r"([ _-]?(set|data|images|split))?[ _-]?((19|20)\d\d)?$")
"""What may follow such a name: "train2017", "val_images", "test-set"."""
_SHARD = re.compile(r"\d{5,}")
"""Folders of img2dataset; its files' names begin with their folder's."""


def split_named(folder: str) -> str | None:
    """The split that a folder is named like."""
    return SPLITS.get(_ORNAMENT.sub("", folder.lower()))


@dataclass(frozen=True)
class Layout:
    """What the folders of a source mean."""

    splits: Mapping[str, str] = field(default_factory=dict[str, str])
    """Folder at the top to its split; empty where the source has none."""
    labelled: frozenset[str] = frozenset()
    """Splits in which the next folder is the class; "" where there are no splits."""

    def split(self, path: str) -> str | None:
        """The split of a file, by its path below the source."""
        return self.splits.get(path.partition("/")[0]) if "/" in path else None

    def place(self, path: str) -> tuple[str, str]:
        """The class of a file, empty where it has none, and why it is in none where others are."""
        top, slash, rest = path.partition("/")
        if self.splits and not (slash and top in self.splits):
            return "", "beside the folders of the splits"
        if self.splits:
            path = rest
        name, slash, _ = path.partition("/")
        if self.splits.get(top, "") not in self.labelled:
            return "", ""
        return (name, "") if slash else ("", "beside the folders of the classes")


def layout_of(paths: Sequence[str], asked: Asked = "auto") -> Layout:
    """Look at where the images are.

    Args:
        paths: Of all images, below the source, with "/".
        asked: What the folders at the top are; "auto" finds out, "flat" is neither.

    Raises:
        ConfigError: no such layout.
        DataError: it could be this or that.
    """
    if asked not in ("auto", "splits", "classes", "flat"):
        raise ConfigError(f"--layout is auto, splits, classes or flat, not {asked!r}")
    below = _by_folder(paths)
    loose = below.pop("", [])
    if asked == "flat" or not below:
        return Layout()
    if asked == "classes":
        return Layout(labelled=frozenset([""]))
    splits = {name: split for name in below if (split := split_named(name))}
    if asked == "splits":
        splits = {name: split_named(name) or name for name in below}
    elif splits and _classes_after_all(below, splits):
        splits = {}
    if not splits:
        return Layout(labelled=frozenset([""] if _are_classes(below, loose, asked, "the source") else []))
    if set(below) - set(splits):
        raise DataError(
            f"folders are named like splits ({shown(splits)}) and not ({shown(set(below) - set(splits))}): give one "
            "of them as SRC, or say what they are with --layout splits, or --layout classes"
        )
    twice = [split for split, times in Counter(splits.values()).items() if times > 1]
    if twice:
        both = [name for name, split in splits.items() if split in twice]
        raise DataError(f"several folders are {twice[0]}: {shown(both)}; give one of them as SRC, or move the others")
    if asked == "auto" and len(loose) >= len(below):
        raise DataError(_unclear(len(loose), "the folders of the splits", below))
    labelled: set[str] = set()
    for name, inner in below.items():
        classes = _by_folder(inner)
        if _are_classes(classes, classes.pop("", []), asked, name):
            labelled.add(splits[name])
    return Layout(splits, frozenset(labelled))


def _by_folder(paths: Iterable[str]) -> dict[str, list[str]]:
    """Paths by their first folder and without it; those in none under ""."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        top, slash, rest = path.partition("/")
        found[top if slash else ""].append(rest if slash else path)
    return dict(sorted(found.items()))


def _classes_after_all(below: Mapping[str, Sequence[str]], splits: Mapping[str, str]) -> bool:
    """Whether the one folder that is named like a split is a class like the others: all hold images, and no folders."""
    return len(splits) == 1 < len(below) and not any("/" in path for paths in below.values() for path in paths)


def _are_classes(below: Mapping[str, Sequence[str]], loose: Sequence[str], asked: Asked, where: str) -> bool:
    """Whether folders are classes; the images beside them are ``loose``."""
    if not below or _are_shards(below):
        return False
    folders = {path.partition("/")[0] if "/" in path else "" for paths in below.values() for path in paths}
    inner = set(map(split_named, folders))
    if None not in inner and len(inner) > 1:
        raise DataError(
            f"in {where} each folder ({shown(below)}) holds splits of its own, which would be mixed: give one of them "
            "as SRC, or take all of a folder as one class with --layout classes"
        )
    if asked == "auto" and len(loose) >= len(below):
        raise DataError(_unclear(len(loose), f"the folders in {where}", below))
    return True


def _are_shards(below: Mapping[str, Sequence[str]]) -> bool:
    """Whether folders are those of img2dataset."""
    return all(
        _SHARD.fullmatch(name) and all(re.fullmatch(rf"{name}\d+\.\w+", path) for path in paths)
        for name, paths in below.items()
    )


def _unclear(loose: int, beside: str, below: Mapping[str, Sequence[str]]) -> str:
    return (
        f"{loose:,} images lie beside {beside} ({shown(below)}): --layout classes rejects them and takes the "
        "folders for classes, --layout flat takes all images without classes"
    )
