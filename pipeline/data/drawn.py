"""Parts of a data set that are drawn by a hash of the key: held-out samples, and a few of each class.

A hash is a number for each key, evenly spread, that depends on nothing else: neither on the order of the samples nor on
which others there are. So two parts of one split never meet, and a smaller part is among a larger one.
Shape letters: N samples.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.config.parts import ByLabel, HeldOut
from pipeline.core.classes import class_name, shown
from pipeline.core.errors import ConfigError, DataError
from pipeline.data.order import Ints


def hashes(keys: npt.NDArray[np.bytes_], purpose: str, seed: int) -> npt.NDArray[np.uint64]:
    """uint64[N], of bytes[N]: BLAKE2b of each key, keyed by the seed; those of another purpose are independent."""
    start = hashlib.blake2b(digest_size=8, key=seed.to_bytes(8, "little"), person=purpose.encode())

    def of(key: bytes) -> bytes:
        own = start.copy()
        own.update(key)
        return own.digest()

    return np.frombuffer(b"".join(of(key) for key in keys.tolist()), "<u8")


def in_part(keys: npt.NDArray[np.bytes_], rule: HeldOut) -> npt.NDArray[np.bool_]:
    """bool[N], which samples belong to the part; samples with the same key always to the same one."""
    held_out = hashes(keys, "held out", rule.seed) < np.uint64(rule.share * 2.0**64)
    return held_out if rule.part == "held_out" else ~held_out


def drawn(
    keys: npt.NDArray[np.bytes_], label: Ints, classes: Sequence[str], rule: ByLabel, where: str
) -> npt.NDArray[np.bool_]:
    """bool[N], which samples are drawn.

    Args:
        keys: of the samples to draw from.
        label: int64[N], their classes' numbers.
        classes: names of all classes; empty where the data set names none.
        rule: how many, and of which classes.
        where: the rule's name in messages.

    Raises:
        ConfigError: there is no such class.
        DataError: a class, or all of them, has too few samples.
    """
    kept = np.isin(label, _numbers(classes, rule, where)) if rule.classes or rule.without else np.ones(len(label), bool)
    if rule.samples is not None:
        places = np.flatnonzero(kept)
        if len(places) < rule.samples:
            raise DataError(f"{where}.samples: {rule.samples} samples asked for, there are {len(places)}; ask for less")
        return _first(keys, places, rule.samples, rule.seed)
    if rule.per_class is None:
        return kept
    numbers = _numbers(classes, rule, where) if classes else np.unique(label[kept]).tolist()
    counts = {number: int((label == number).sum()) for number in numbers}
    few = [f"{classes[n] if classes else n} ({count})" for n, count in counts.items() if count < rule.per_class]
    if few or not numbers:
        raise DataError(
            f"{where}.per_class: {rule.per_class} samples of each class asked for, but there are fewer of "
            f"{shown(few) or 'all'}; ask for less, or leave such classes out by 'without'"
        )
    found = np.zeros(len(label), bool)
    for number in numbers:
        found |= _first(keys, np.flatnonzero(label == number), rule.per_class, rule.seed)
    return found


def _first(keys: npt.NDArray[np.bytes_], places: Ints, count: int, seed: int) -> npt.NDArray[np.bool_]:
    """bool[N], the ``count`` samples at ``places`` with the smallest hashes."""
    order = np.argsort(hashes(keys[places], "by label", seed), kind="stable")
    found = np.zeros(len(keys), bool)
    found[places[order[:count]]] = True
    return found


def _numbers(classes: Sequence[str], rule: ByLabel, where: str) -> list[int]:
    """Of the classes that there are."""
    known = {name: number for number, name in enumerate(classes)}
    named = [class_name(name) for name in (*rule.classes, *rule.without)]
    for name in named:
        if name not in known:
            near = difflib.get_close_matches(name, classes, 1)
            there = f"did you mean {near[0]!r}?" if near else f"there are {shown(classes, 10) or 'no names'}"
            raise ConfigError(f"{where}.{'classes' if rule.classes else 'without'}: no class {name!r}; {there}")
    return sorted(known[name] for name in known if (name in named) == bool(rule.classes))
