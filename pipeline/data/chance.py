"""By what crops, captions and other fields of a sample are drawn: its epoch and number, or its augmentation and key.

With ``data.augmentations = n`` chance repeats after n epochs, and depends on the sample's key, the number of the
augmentation and ``data.augmentation_seed`` alone: not on the run's seed, nor on which other samples there are. So what
a teacher made of an augmentation once belongs to it in every run, on any part of the data set.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.config.schema import Data
from pipeline.core.manifest import Manifest
from pipeline.data.dataset import keys_of
from pipeline.data.order import Ints
from pipeline.data.selection import Selection, sources

_KNOWN = 4
"""Data sets whose names are kept: a run opens each several times."""
_names: dict[str, Ints] = {}


@dataclass(frozen=True)
class Chance:
    """What decides the random numbers of a data set's samples."""

    seed: int
    augmentations: int | None = None
    """After so many epochs the same come again; None: never."""
    names: Ints | None = None
    """int64[N], a number for each sample that stands for its key; None: its number in the data set does."""

    def of(self, epoch: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """What random numbers are a function of.

        Args:
            epoch: int64[B].
            sample: int64[B], numbers in the data set.

        Returns:
            Two int64[B].
        """
        if self.augmentations is None or self.names is None:
            return epoch, sample
        return epoch % self.augmentations, torch.from_numpy(self.names)[sample]


def chance_of(data: Data, manifest: Manifest, seed: int) -> Chance:
    """That of a data set.

    Args:
        data: ``augmentations``.
        manifest: the data set; where there are augmentations, the keys of all its samples are read.
        seed: of the run.

    Raises:
        DataError: the index of a shard is missing or damaged.
    """
    if data.augmentations is None:
        return Chance(seed)
    return Chance(data.augmentation_seed, data.augmentations, np.concatenate([_named(p) for p in sources(manifest)]))


def _named(manifest: Manifest) -> Ints:
    """A number for each key, int64[N]."""
    known = manifest.fingerprint
    if known not in _names:
        while len(_names) >= _KNOWN:
            _names.pop(next(iter(_names)))
        _names[known] = np.array([number_of(key) for key in sample_keys(manifest).tolist()], np.int64)
    return _names[known]


def sample_keys(manifest: Manifest) -> np.ndarray:
    """bytes[N], the keys of a data set's samples, or of a part's.

    Raises:
        DataError: the index of a shard is missing or damaged.
    """
    return keys_of(manifest.whole)[manifest.kept] if isinstance(manifest, Selection) else keys_of(manifest)


def number_of(key: bytes) -> int:
    """What stands for a key: the same in every data set."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
