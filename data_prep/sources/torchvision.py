"""Any torchvision data set that lies on the disk already, by name. Nothing is downloaded."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

from PIL import Image

from data_prep.fetch import Failed
from data_prep.labels import NONE_KNOWN, Classes, Known, Label, named
from data_prep.record import Inline, LocalFile, Payload, Record, file_stamp
from pipeline.core.classes import class_name, shown
from pipeline.core.errors import ConfigError, DataError


@dataclass
class TorchvisionSource:
    """Samples of ``torchvision.datasets.NAME``."""

    name: str
    root: str
    splits: Mapping[str, Mapping[str, Any]]
    """Split to the data set's arguments that select it: {"train": {"train": True}, "val": {"train": False}}."""
    known: Known = NONE_KNOWN
    positional: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        self._sets = {split: _open(self.name, self.root, tuple(sorted(a.items()))) for split, a in self.splits.items()}
        self.total: int | None = sum(len(s) for s in self._sets.values())
        lists = {split: _class_names(dataset) for split, dataset in self._sets.items()}
        self._names = next(iter(lists.values()), ())
        for split, names in lists.items():
            if names != self._names:
                differ = sorted({*names} ^ {*self._names}) or names
                raise DataError(f"{self.name}: {split} has other classes than the first split: {shown(differ)}")
        labels = {label for d in self._sets.values() for t in _targets(d, self._names) if (label := self._label(t))}
        self._classes = Classes(labels, self.known, self._names)
        self.classes: tuple[str, ...] = self._classes.names

    def _label(self, target: int | None) -> Label | None:
        """The label of a number; None of what has none, as the unlabelled images of STL10 (-1)."""
        if target is None or target < 0:
            return None
        return named(self._names[target]) if target < len(self._names) else Label(str(target), named=False)

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
                    stamp, place = file_stamp(path), str(path)
                else:
                    image, stamp, target = _item(dataset, i)
                    place = key
                number, caption, metadata = _target(target)
                label, wrong = self._classes.look_up(self._label(number))
                image = Failed(wrong) if wrong else image
                yield Record(key, place, image, stamp, label, caption, {}, metadata, split)


def _class_names(dataset: Any) -> tuple[str, ...]:
    """The names of a data set's classes; of ImageNet, whose classes are groups of words, the first word of each.

    Where several classes have the same first word, all their words; where these are the same too (the two cranes), with
    the class's WordNet id.
    """
    classes = getattr(dataset, "classes", None) or getattr(dataset, "categories", None) or ()
    words = [tuple(map(str, c)) if isinstance(c, (tuple, list)) else (str(c),) for c in classes]
    ids = getattr(dataset, "wnids", None) or range(len(words))
    names = [class_name(w[0]) for w in words]
    for further in ([", ".join(w) for w in words], [f"{', '.join(w)} ({i})" for w, i in zip(words, ids, strict=False)]):
        times = Counter(names)
        names = [class_name(more) if times[name] > 1 else name for name, more in zip(names, further, strict=True)]
    return tuple(names)


def _targets(dataset: Any, names: Sequence[str]) -> Iterable[int | None]:
    """The numbers of a data set without names of classes: as it lists them, or from looking through it."""
    if names:
        return ()
    listed = next((t for a in ("targets", "labels", "_labels") if (t := getattr(dataset, a, None)) is not None), None)
    if listed is None:
        listed = (_item(dataset, i)[2] for i in range(len(dataset)))
    return {_target(target)[0] for target in listed}


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
        takes_root = "root" in inspect.signature(make).parameters
        return make(root, **dict(arguments)) if takes_root else make(**dict(arguments))
    except TypeError as error:
        raise ConfigError(f"torchvision's {name}: {error}; it takes {inspect.signature(make)}") from error
    except ImportError as error:
        raise ConfigError(f"torchvision's {name} needs another package, install it: {error}") from error
    except (RuntimeError, OSError) as error:
        raise DataError(f"torchvision's {name} is not at {root}: {error}") from error
    except Exception as error:  # each reads files of its own, and fails at them in its own way
        raise DataError(f"torchvision's {name} at {root} cannot be read: {type(error).__name__}: {error}") from error


def _item(dataset: Any, number: int) -> tuple[Payload, str, Any]:
    """Image, its stamp, and target of a sample; one that torchvision cannot read is rejected."""
    try:
        picture, target = dataset[number][:2]
        return *_encoded(picture), target
    except ImportError as error:
        raise ConfigError(f"torchvision needs another package to read this, install it: {error}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's, not Pillow's of a broken file
            raise
        return Failed(f"torchvision cannot read it: {type(error).__name__}: {error}"), "broken", None


def _encoded(picture: Any) -> tuple[Payload, str]:
    """An image as PNG, and its hash."""
    if not isinstance(picture, Image.Image):
        return Failed(f"not an image but {type(picture).__name__}"), "none"
    target = io.BytesIO()
    mode = picture.mode if picture.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else "RGB"
    picture.convert(mode).save(target, "PNG", compress_level=1)
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
