"""Outputs of a teacher that `sluice prep embed` has stored: what their data set says of itself, how a row is laid out.

A sample has one array for all its augmentations, ``out.npy`` [A,W]: columns of each output beside each other. Where
only the top k logits of K are stored, its last columns are those and the log-sum-exp of the others, and
``top.npy`` [A,k] says whose they are. Shape letters: N samples, A augmentations, W columns, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.config.schema import Data, Image
from pipeline.core.errors import ConfigError
from pipeline.core.manifest import Manifest
from pipeline.data.selection import Selection

MADE = "embedded"
"""In what a manifest says of how it was made."""
MEMBER, CLASSES = "out.npy", "top.npy"
LOGITS = "logits"
"""The output of which the top may be stored alone."""
KIND = "stored"
"""Of fields that hold such outputs."""


@dataclass(frozen=True)
class Layout:
    """Where the outputs stand in a row."""

    widths: Mapping[str, int]
    """Of each output as a batch has it."""
    top: int | None = None
    """Logits that are stored of the K; None: all."""

    @cached_property
    def columns(self) -> dict[str, slice]:
        """Where each output stands in a stored row."""
        found, at = dict[str, slice](), 0
        for name, width in self.widths.items():
            stored = self.top + 1 if self.top is not None and name == LOGITS else width
            found[name] = slice(at, at + stored)
            at += stored
        return found

    @cached_property
    def width(self) -> int:
        """W."""
        return max(place.stop for place in self.columns.values())

    def pack(self, outputs: Mapping[str, np.ndarray], dtype: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows as they are stored, [N,W], and the classes of the top, int32[N,k].

        Args:
            outputs: float32[N,D] each.
            dtype: "float16" or "float32".

        Raises:
            ConfigError: a number is too large for ``dtype``, or none.
        """
        parts = {name: outputs[name] for name in self.widths}
        classes = None
        if self.top is not None:
            parts[LOGITS], classes = _top(parts[LOGITS], self.top)
        with np.errstate(over="ignore"):
            rows = np.concatenate(list(parts.values()), axis=1).astype(dtype)
        for name, place in self.columns.items():
            if not np.isfinite(rows[:, place]).all():
                large = np.abs(parts[name]).max()
                remedy = "; store float32" if np.isfinite(large) else ", which no student can follow"
                raise ConfigError(f"the teacher's {name} reach {large:g}, too large for {dtype}{remedy}")
        return rows, classes

    def unpack(self, row: np.ndarray, classes: np.ndarray | None) -> dict[str, np.ndarray]:
        """One stored row, [W] and int[k], as outputs, float32 each. Logits that were left out share what is left."""
        found = {name: row[place].astype(np.float32) for name, place in self.columns.items()}
        if classes is not None:
            *top, rest = found[LOGITS]
            count = self.widths[LOGITS]
            logits = np.full(count, rest - math.log(count - len(top)), np.float32)
            logits[classes] = top
            found[LOGITS] = logits
        return found


def _top(logits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest logits, largest first, with the log-sum-exp of the others after them, and whose they are."""
    order = np.argsort(-logits, axis=1, kind="stable")
    ranked = np.take_along_axis(logits, order, axis=1).astype(np.float64)
    rest = ranked[:, count:]
    peak = rest.max(axis=1, keepdims=True)
    sum_exp = peak + np.log(np.exp(rest - peak).sum(axis=1, keepdims=True))
    return np.concatenate([ranked[:, :count], sum_exp], axis=1), order[:, :count].astype(np.int32)


def facts_of(manifest: Manifest, sidecar: str, where: str) -> dict[str, Any]:
    """What stored outputs say of themselves.

    Args:
        manifest: the data set that they are joined to.
        sidecar: their name there.
        where: what the field is called in messages.

    Raises:
        ConfigError: no such sidecar, or one that `sluice prep embed` has not made.
    """
    sides = manifest.sides if isinstance(manifest, Selection) else {}
    if sidecar not in sides:
        raise ConfigError(f"{where}: there is no [data.sidecar.{sidecar}]; add it, with the path of the stored outputs")
    side = sides[sidecar].manifest
    if MADE not in side.made:
        raise ConfigError(f"{where}: {side.root} holds no teacher's outputs; make them with `sluice prep embed`")
    return side.made[MADE]


def hold(data: Data, facts: Mapping[str, Any], where: str) -> None:
    """Hold the crops that outputs were made of against those that a run would see.

    Raises:
        ConfigError: they are others.
    """
    stored = int(facts["augmentations"])
    if data.augmentations is None and (data.image.crop == "random_resized" or facts["captions"]):
        raise ConfigError(
            f"{where}: outputs of {stored} augmentations are stored, and this run would crop anew in every epoch; set "
            f"data.augmentations = {stored}"
        )
    if (data.augmentations or 1) > stored:
        raise ConfigError(
            f"{where}: outputs of {stored} augmentations are stored, fewer than data.augmentations = "
            f"{data.augmentations}; set it to {stored}, or embed again"
        )
    if facts["augmentation_seed"] != data.augmentation_seed:
        raise ConfigError(
            f"{where}: the stored outputs are of data.augmentation_seed = {facts['augmentation_seed']}, not "
            f"{data.augmentation_seed}; set it to that, or embed again"
        )
    then, now = facts["image"], plain(data.image)
    if other := [key for key in now if then.get(key) != now[key]]:
        key = other[0]
        raise ConfigError(
            f"{where}: the stored outputs are of images with data.image.{key} = {then.get(key)}, not {now[key]}; the "
            "teacher has seen other crops: set it to that, or embed again"
        )
    captions = data.captions.model_dump(mode="json", exclude={"tokenizer"})
    if facts["captions"] and facts["captions"] != captions:
        raise ConfigError(
            f"{where}: the stored outputs are of other data.captions; set them as they were, or embed again"
        )


def plain(image: Image) -> dict[str, Any]:
    """The geometry that decides what a teacher sees."""
    return image.model_dump(mode="json")
