"""What each sample lost, epoch by epoch: ``losses/epoch-00003.npy``, float32[N], NaN where the sample was not seen yet.

A sample's number is its id in the training data. Values are written over when a run goes on from an earlier step, by
those of the same samples at the same steps, so that neither a kill nor another number of ranks leaves a trace.
No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from pipeline.core.errors import ConfigError, DataError
from pipeline.core.files import replace_file

FOLDER = "losses"
SETS = "sets.json"
NUMBERS = "numbers-{}.npy"
Floats: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"
Ints: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"
Order = Literal["worst", "forgotten", "late"]


class LossFiles:
    """The files of a run, on the rank that writes them.

    Args:
        folder: of the run.
        samples: N.
    """

    def __init__(self, folder: Path, samples: int) -> None:
        self.folder, self.samples = folder / FOLDER, samples
        self._open: dict[int, Floats] = {}

    def describe(self, sets: Sequence[tuple[str, int, Ints | None]]) -> None:
        """Say what the ids mean.

        Args:
            sets: of each data set, in the order of the ids: its path, its samples, and where it is a part of one, their
                numbers in the whole.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for place, (_, _, numbers) in enumerate(sets):
            if numbers is not None:
                np.save(self.folder / NUMBERS.format(place), numbers)
        facts = [{"path": path, "samples": n, "part": numbers is not None} for path, n, numbers in sets]
        replace_file(self.folder / SETS, json.dumps(facts).encode())

    def write(self, epoch: Ints, ids: Ints, losses: Floats) -> None:
        """Keep the losses of samples, [n] each.

        Raises:
            OSError: the disk takes no more.
        """
        for number in np.unique(epoch):
            mine = epoch == number
            self._epoch(int(number))[ids[mine]] = losses[mine]

    def flush(self) -> None:
        """Bring all to the disk; epochs before the last are not kept open."""
        for number in sorted(self._open):
            np.memmap.flush(self._open[number])  # pyright: ignore[reportArgumentType]
        for number in sorted(self._open)[:-1]:
            del self._open[number]

    def _epoch(self, number: int) -> Floats:
        if number not in self._open:
            path = self.folder / f"epoch-{number:05d}.npy"
            if not path.exists():
                new = np.full(self.samples, np.nan, np.float32)
                np.save(path.with_suffix(".part.npy"), new)
                path.with_suffix(".part.npy").rename(path)
            self._open[number] = np.load(path, mmap_mode="r+", allow_pickle=False)
        return self._open[number]


class Listed(NamedTuple):
    """A sample in a list."""

    id: int
    """In the run."""
    where: str
    """Its data set."""
    number: int
    """In that."""
    losses: list[float]
    """By epoch; NaN where it was not seen."""


class History:
    """What a run's samples lost.

    Args:
        run: its folder.

    Raises:
        ConfigError: nothing was kept.
        DataError: a file is damaged.
    """

    def __init__(self, run: Path) -> None:
        folder = run / FOLDER
        paths = sorted(p for p in folder.glob("epoch-*.npy") if not p.name.endswith(".part.npy"))
        if not paths:
            raise ConfigError(f'{run} has kept no losses; train with record.losses = "every epoch"')
        try:
            self.sets: list[Mapping[str, Any]] = json.loads((folder / SETS).read_text(encoding="utf-8"))
            self.epochs = [int(p.stem.partition("-")[2]) for p in paths]
            self.losses: Floats = np.stack([np.load(p, allow_pickle=False) for p in paths])
            self._numbers = [
                np.load(folder / NUMBERS.format(place), allow_pickle=False) if known["part"] else None
                for place, known in enumerate(self.sets)
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder} is damaged ({error}); remove it: what follows is kept anew") from error

    def listed(self, ids: Sequence[int] | Ints) -> list[Listed]:
        """Samples with what is known of them."""
        starts = np.cumsum([0, *(known["samples"] for known in self.sets)])
        found = []
        for number in map(int, ids):
            place = int(np.searchsorted(starts, number, side="right")) - 1
            inner, numbers = number - int(starts[place]), self._numbers[place]
            own = inner if numbers is None else int(numbers[inner])
            found.append(Listed(number, self.sets[place]["path"], own, self.losses[:, number].tolist()))
        return found

    def order(self, by: Order) -> Ints:
        """Ids of the samples that were seen, the most remarkable first.

        worst: by the last loss. forgotten: by how far the last loss lies above the least before, where it does. late:
        by the first epoch from which on the loss stayed below the median of all last losses, the latest first; those
        that never came below it come before all others, the higher last loss first.
        """
        last = self.last()
        seen = np.flatnonzero(~np.isnan(last))
        if by == "worst":
            return seen[np.argsort(-last[seen], kind="stable")]
        if by == "forgotten":
            least = np.fmin.reduce(self.losses, axis=0)
            rise = (last - least)[seen]
            kept = seen[rise > 0]
            return kept[np.argsort(-rise[rise > 0], kind="stable")]
        below = (self.losses < np.median(last[seen])) | np.isnan(self.losses)
        learnt = len(self.losses) - np.logical_and.accumulate(below[::-1], axis=0).sum(axis=0)
        return seen[np.lexsort((-last[seen], -learnt[seen]))]

    def last(self) -> Floats:
        """The last loss of each sample, float32[N]; NaN: never seen."""
        last = self.losses[0].copy()
        for later in self.losses[1:]:
            last = np.where(np.isnan(later), last, later)
        return last
