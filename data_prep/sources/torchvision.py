"""Any torchvision data set that lies on the disk already, by name. Nothing is downloaded."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

from data_prep.fetch import Failed
from data_prep.record import Inline, LocalFile, Payload, Record, file_stamp
from pipeline.core.errors import ConfigError, DataError


@dataclass
class TorchvisionSource:
    """Samples of ``torchvision.datasets.NAME``."""

    name: str
    root: str
    splits: Mapping[str, Mapping[str, Any]]
    """Split to the data set's arguments that select it: {"train": {"train": True}, "val": {"train": False}}."""
    positional: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        self._sets = {split: _open(self.name, self.root, tuple(sorted(a.items()))) for split, a in self.splits.items()}
        self.total: int | None = sum(len(s) for s in self._sets.values())
        self.classes: tuple[str, ...] = ()
        for dataset in self._sets.values():
            names = tuple(str(c) for c in getattr(dataset, "classes", ()))
            if self.classes and names != self.classes:
                raise DataError(f"{self.name}: the splits have different classes")
            self.classes = names

    def describe(self) -> dict[str, Any]:
        """See :class:`~data_prep.record.Source`."""
        splits = {split: dict(arguments) for split, arguments in self.splits.items()}
        return {"kind": "torchvision", "name": self.name, "root": self.root, "splits": splits}

    def __iter__(self) -> Iterator[Record]:
        for split, dataset in self._sets.items():
            files = getattr(dataset, "samples", None)
            for i in range(len(dataset)):
                key = f"{split}-{i:08d}"
                if files is not None:
                    path, target = files[i][:2]
                    image: Payload = LocalFile(str(path))
                    stamp = file_stamp(path)
                else:
                    picture, target = dataset[i][:2]
                    image, stamp = _encoded(picture)
                label, caption, metadata = _target(target)
                yield Record(key, key, image, stamp, label, caption, {}, metadata, split)


@lru_cache(maxsize=4)
def _open(name: str, root: str, arguments: tuple[tuple[str, Any], ...]) -> Any:
    from torchvision import datasets

    names = [n for n in datasets.__all__ if inspect.isclass(getattr(datasets, n))]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
        raise ConfigError(f"unknown torchvision data set {name!r}; {hint}")
    make = getattr(datasets, name)
    try:
        return make(root, **dict(arguments))
    except TypeError as error:
        raise ConfigError(f"torchvision's {name}: {error}; it takes {inspect.signature(make)}") from error
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(f"torchvision's {name} is not at {root}: {error}") from error


def _encoded(picture: Any) -> tuple[Payload, str]:
    """An image as PNG, and its hash."""
    if not hasattr(picture, "save"):
        return Failed(f"not an image but {type(picture).__name__}"), "none"
    target = io.BytesIO()
    picture.save(target, "PNG", compress_level=1)
    return Inline(target.getvalue()), hashlib.sha256(target.getvalue()).hexdigest()


def _target(target: Any) -> tuple[int | None, str | None, dict[str, Any] | None]:
    """Label, caption, metadata."""
    if hasattr(target, "tolist"):
        target = target.tolist()
    if isinstance(target, int):
        return target, None, None
    if isinstance(target, str):
        return None, target, None
    if isinstance(target, list) and target and all(isinstance(t, str) for t in cast("list[Any]", target)):
        return None, target[0], {"captions": target}
    return None, None, {"target": target}
