"""A linear head as a file, with what it fits: the weights of its encoder, what is read off it, the classes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

from torch import nn

from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.core.evaluation import Reading
from pipeline.evals._heads import Linear
from pipeline.nn.weights import read, save, weights_hash

FILE = "head.safetensors"
KEY = "sluice.head"
"""Of the metadata."""


class KeptHead(NamedTuple):
    """A head, and what it fits."""

    linear: Linear
    reading: Reading
    rate: float
    """That it was trained with."""
    classes: tuple[str, ...]
    encoder: str
    """Hash of the encoder's weights."""


def keep_head(folder: Path, head: KeptHead) -> Path:
    """Write a head into a folder; returns the file, whole or not there at all."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {"encoder": head.encoder, "reading": head.reading._asdict(), "rate": head.rate, "classes": head.classes}
    save(folder / FILE, head.linear._asdict(), {KEY: json.dumps(told)})
    return folder / FILE


def _file(path: str | os.PathLike[str]) -> Path:
    return Path(path) / FILE if Path(path).is_dir() else Path(path)


def content_of(path: str) -> str:
    """Hash of a head's file, by which it is known wherever it lies; the path itself where none can be read."""
    try:
        return hashlib.sha256(_file(path).read_bytes()).hexdigest()[:32]
    except OSError:  # `kept_head` says so
        return path


def kept_head(path: str | os.PathLike[str], encoder: nn.Module) -> KeptHead:
    """Read a head.

    Args:
        path: of the file, or of the folder that it is in.
        encoder: that it is to be used on.

    Raises:
        CheckpointError: no such file, damaged, or no head.
        ConfigError: it was trained on other weights.
    """
    file = _file(path)
    tensors, metadata = read(file)
    if KEY not in metadata or tensors.keys() != {"weight", "bias"}:
        raise CheckpointError(f"{file} holds no head of a linear probe")
    told = json.loads(metadata[KEY])
    head = KeptHead(
        Linear(**tensors), Reading(**told["reading"]), told["rate"], tuple(told["classes"]), told["encoder"]
    )
    found = weights_hash({"image": encoder})
    if found != head.encoder:
        raise ConfigError(
            f"{file} was trained on an encoder with other weights ({head.encoder[:12]}) than this one's "
            f"({found[:12]}); leave 'head' out to train one"
        )
    return head
