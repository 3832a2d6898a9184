"""The data sets that a configuration names: of each the samples that are kept, and what is joined to them by key.

A part of a data set is a data set: its samples are numbered anew, in their order, and it has a fingerprint of its own.
Nothing is rewritten. Keys are compared as they are; while they are, a process holds them all. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.data import Beside, Data, Sidecar, Source
from pipeline.config.parts import Choice
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.location import reason
from pipeline.core.manifest import Manifest, join, load, load_index
from pipeline.core.where import Where
from pipeline.data.drawn import drawn, in_part
from pipeline.data.order import Ints
from pipeline.data.selected import labels, look
from pipeline.data.selection import Selection, Side

_THREADS = 8
"""Indexes that are read at a time."""
_NAMED = 3
"""Keys in a message."""


def open_data(data: Data, where: str = "data") -> Manifest:
    """The data set ``data.train``; ``where`` is what it is called in messages.

    Raises:
        DataError: no manifest there; keys that are not there, or not joined.
        ConfigError: a list or a condition that cannot be read.
    """
    return _opened(data.train, data, where)


def open_beside(name: str, beside: Beside) -> Manifest:
    """A data set beside the first; see :func:`open_data`."""
    return _opened(beside.path, beside, f"data.beside.{name}")


def _opened(path: str | tuple[Source, ...], own: Data | Beside, where: str) -> Manifest:
    if isinstance(path, str):
        return _select(load(path), own, own.sidecar, where)
    return join([_select(load(source), source, {}, f"{where}.train[{i}]") for i, source in enumerate(path)])


def _select(whole: Manifest, rules: Choice, sidecars: Mapping[str, Sidecar], where: str) -> Manifest:
    """The samples that are kept, with their sidecars."""
    if not (rules.rules or sidecars):
        return whole
    kept = np.arange(whole.samples)
    chosen: dict[str, Any] = {}
    keys = keys_of(whole) if sidecars or rules.rules.keys() - {"where"} else np.empty(0, "S1")
    if rules.keep:
        kept = _listed(rules.keep, keys, whole, f"{where}.keep")
        chosen["keep"] = f"{len(kept)} of {whole.samples} samples"
    if rules.held_out:
        kept = kept[in_part(keys[kept], rules.held_out)]
        chosen["held_out"] = str(rules.held_out)
    sides: dict[str, Side] = {}
    for name, sidecar in sidecars.items():
        sides[name] = _joined(sidecar, keys, kept, f"{where}.sidecar.{name}")
        chosen[f"sidecar.{name}"] = sides[name].manifest.fingerprint
        if sidecar.missing == "drop":
            kept = kept[sides[name].rows[kept] >= 0]
    strict = {name: side for name, side in sides.items() if sidecars[name].missing == "refuse"}
    if rules.where:
        condition = Where(rules.where, f"{where}.where")
        asked = {column.rpartition(":")[0] for column in condition.columns}
        for name in asked & strict.keys():  # of a sample that it lacks nobody can say whether the condition holds
            _hold_complete(strict[name], keys, whole, kept, f"{where}.sidecar.{name}")
        kept = kept[_holds(_selection(whole, kept, sides, chosen), condition, f"{where}.where")]
        chosen["where"] = rules.where
    if rules.by_label:
        label = labels(_selection(whole, kept, sides, chosen))
        kept = kept[drawn(keys[kept], label, whole.classes, rules.by_label, f"{where}.by_label")]
        chosen["by_label"] = str(rules.by_label)
    if not len(kept):
        raise DataError(f"{where}: of {whole.samples} samples of {whole.root} none is kept")
    for name, side in strict.items():
        _hold_complete(side, keys, whole, kept, f"{where}.sidecar.{name}")
    if sides:
        numbers_of(keys[kept], keys[kept], whole.root)  # a key that stands twice would get the same row twice
    return _selection(whole, kept, sides, chosen)


def _selection(whole: Manifest, kept: Ints, sides: Mapping[str, Side], chosen: Mapping[str, Any]) -> Selection:
    """``sides`` have rows for all samples of the whole, those of the result only for the ones that are kept."""
    counts = np.diff(np.searchsorted(kept, whole.starts))
    shards = tuple(replace(s, samples=n) for s, n in zip(whole.shards, counts.tolist(), strict=True) if n)
    fields = whole.fields | {f"{n}:{f}": e for n, side in sides.items() for f, e in side.manifest.fields.items()}
    own = {name: Side(side.manifest, side.rows[kept]) for name, side in sides.items()}
    return Selection(
        whole.root, shards, fields, whole.classes, whole.statistics, whole.made, whole.tokenizer, whole.domain,
        whole=whole, kept=kept, sides=own, chosen=dict(chosen) | {"samples": len(kept)},
    )  # fmt: skip


def keys_of(manifest: Manifest) -> np.ndarray:
    """bytes[N], the keys of all samples.

    Raises:
        DataError: the index of a shard is missing or damaged.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        indexes = pool.map(lambda shard: load_index(manifest, shard), manifest.shards)
        return np.array([key.encode() for index in indexes for key in index.keys] or [b""], bytes)[: manifest.samples]


def numbers_of(wanted: np.ndarray, keys: np.ndarray, where: str) -> Ints:
    """int64[W], at which number each of W keys stands among N; -1: nowhere.

    Raises:
        DataError: a wanted key stands twice among the N, so that it names no sample.
    """
    if not len(keys):
        return np.full(len(wanted), -1)
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    at = np.searchsorted(ordered, wanted).clip(max=len(keys) - 1)
    there = ordered[at] == wanted
    twice = np.flatnonzero(there & (ordered[(at + 1).clip(max=len(keys) - 1)] == wanted) & (at + 1 < len(keys)))
    if len(twice):
        key = bytes(wanted[twice[0]]).decode()
        raise DataError(f"{where}: the key {key!r} stands for several samples, so it joins none")
    return np.where(there, order[at], -1)


def _listed(keep: str, keys: np.ndarray, whole: Manifest, where: str) -> Ints:
    """The samples in a list of keys, or of numbers, one a line."""
    try:
        text = Path(keep).read_text("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{where}: cannot read {keep} ({reason(error)})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: {keep} is not UTF-8") from error
    lines = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    if not lines:
        raise ConfigError(f"{where}: {keep} names no sample")
    numbers = numbers_of(np.array([line.encode() for line in lines], bytes), keys, whole.root)
    if (numbers < 0).all() and all(line.isascii() and line.isdigit() and len(line) < 19 for line in lines):
        numbers = np.array([int(line) for line in lines], np.int64)
        numbers[numbers >= whole.samples] = -1
    absent = np.flatnonzero(numbers < 0)
    if len(absent):
        named = ", ".join(repr(lines[i][:80]) for i in absent[:_NAMED].tolist())
        raise DataError(
            f"{where}: {len(absent)} of {len(lines)} lines of {keep} are no keys of {whole.root}, first {named}; "
            f"write its keys, or numbers of samples from 0 to {whole.samples - 1}, and nothing else"
        )
    return np.unique(numbers)


def _joined(sidecar: Sidecar, keys: np.ndarray, kept: Ints, where: str) -> Side:
    """A sidecar, with a row for each of the samples of the whole that are kept so far."""
    side = load(sidecar.path)
    rows = np.full(len(keys), -1)
    rows[kept] = numbers_of(keys[kept], keys_of(side), f"{where}: {side.root}")
    return Side(side, rows)


def _hold_complete(side: Side, keys: np.ndarray, whole: Manifest, kept: Ints, where: str) -> None:
    """Refuse a sidecar that lacks some of the samples."""
    absent = kept[side.rows[kept] < 0]
    if len(absent):
        named = ", ".join(repr(bytes(keys[i]).decode()) for i in absent[:_NAMED].tolist())
        raise DataError(
            f"{where}: {len(absent)} of {len(kept)} samples of {whole.root} are not in {side.manifest.root}, first "
            f'{named}; add them, or set missing = "drop" to leave such samples out, or "allow" to keep them'
        )


def _holds(selection: Selection, wanted: Where, where: str) -> np.ndarray:
    """bool[N], for which samples a condition on their metadata holds."""
    members = {_member(column) for column in wanted.columns}
    unknown = sorted(members - set(selection.fields))
    if unknown:
        known = ", ".join(selection.fields) or "none"
        raise ConfigError(f"{where}: {selection.root} has no {unknown[0]!r} to look at, only {known}")
    return look(selection, {column: _member(column) for column in wanted.columns}, wanted.keeps)


def _member(column: str) -> str:
    """The member that a column is looked up in: "score" in the metadata, "NAME:score" in that of a sidecar."""
    name, colon, _ = column.rpartition(":")
    return f"{name}{colon}metadata"
