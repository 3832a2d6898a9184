"""Images that ranks hold, written as a data set, so that something can be trained on them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from data_prep.build import build
from data_prep.options import Options
from data_prep.record import LocalFile, Record
from pipeline.core.errors import DataError
from pipeline.dist.group import by_all, by_first
from pipeline.evals._samples import in_order
from pipeline.nn.images import tile
from pipeline.record.pictures import png


@dataclass(frozen=True)
class Written:
    """What the data set is built from: a file for each number, and its label."""

    folder: Path
    ids: Sequence[int]
    labels: Sequence[int]
    classes: tuple[str, ...]
    positional: bool = False

    @property
    def total(self) -> int:
        """Number of images."""
        return len(self.ids)

    def describe(self) -> dict[str, Any]:
        """Where it comes from."""
        return {"source": "images of an evaluation"}

    def __iter__(self) -> Iterator[Record]:
        """In the order of the numbers."""
        for number, label in zip(self.ids, self.labels, strict=True):
            key = f"{number:09d}"
            yield Record(key, key, LocalFile(str(self.folder / f"{key}.png")), label=label, split="train")


def write(parts: Iterable[tuple[Tensor, Tensor, Tensor]], classes: tuple[str, ...], folder: Path) -> Path:
    """Write a data set; all ranks call this together, and see the same files.

    Args:
        parts: this rank's: numbers int64[B], images uint8[B,C,H,W], labels int64[B].
        classes: their names.
        folder: to make; what is there is removed.

    Returns:
        The data set's folder.

    Raises:
        DataError: it cannot be written, or ``parts`` raises it; on every rank.
    """
    raw, kept = folder / "images", list[tuple[Tensor, Tensor]]()

    def begin() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        raw.mkdir(parents=True)

    def save() -> None:
        for ids, images, labels in parts:
            for number, image in zip(ids.tolist(), images, strict=True):
                (raw / f"{number:09d}.png").write_bytes(png(tile([image[None]])))
            kept.append((ids, labels))

    def pack(source: Written) -> None:
        build(source, folder / "shards", Options(splits={}))
        shutil.rmtree(raw)

    by_first(lambda: _written(begin, folder))
    by_all(lambda: _written(save, folder))
    ids, labels = in_order(kept)
    by_first(lambda: _written(lambda: pack(Written(raw, ids.tolist(), labels.tolist(), classes)), folder))
    return folder / "shards" / "train"


def _written(work: Callable[[], None], folder: Path) -> None:
    try:
        work()
    except OSError as error:
        raise DataError(
            f"cannot write images into {folder} ({error.strerror}); make room, or name another --out"
        ) from error
