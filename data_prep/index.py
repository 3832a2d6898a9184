"""Taking tars as they are into the house: a manifest and indexes beside them, the tars untouched."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np

from data_prep.ahead import cores, in_order, processes
from data_prep.places import tars
from data_prep.record import check_classes, label_number
from data_prep.scan import Scan, scan
from data_prep.statistics import Statistics
from data_prep.store import LocalStore, Store, open_store
from pipeline.core.errors import DataError
from pipeline.core.manifest import FIELDS, FILE, SIZES, Manifest, Shard, index_bytes, index_name, parse, sizes_json

MUCH = 512 * 1024**2
"""Bytes for which it is worth starting processes: they take as long as looking through so many."""
TEXTS = (b".txt", b".cls")
"""Members that are measured by their content."""


class Found(NamedTuple):
    """A tar that was looked through."""

    shard: Shard
    statistics: Statistics
    together: set[frozenset[str]]
    """Sets of extensions that occur in one sample."""
    problem: str
    """What is wrong with it; empty when nothing is."""


def index(
    folder: str,
    *,
    pattern: str = "",
    classes: Sequence[str] = (),
    skip_damaged: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Look through the tars of a folder and write indexes, sizes.json and manifest.json beside them.

    Args:
        folder: Folder or fsspec URL. A manifest that is there already is renewed; its classes, tokenizer and history
            are kept.
        pattern: Which tars, with braces: ``{000..099}.tar``; empty: all of the folder, by name, or if it has none, of
            its sub-folders.
        classes: Names of the labels; left out, labels that are numbers name themselves.
        skip_damaged: Leave damaged tars out instead of stopping.
        progress: Called with the number of tars looked through, and of all.

    Raises:
        DataError: no tars, or damaged ones (all are listed).
    """
    store = open_store(folder)
    try:
        names = _names(store, pattern)
        shards: list[Shard] = []
        damaged: list[str] = []
        statistics = Statistics()
        together: set[frozenset[str]] = set()
        for name, found in _looked_through(store, names):
            if found.problem:
                damaged.append(f"{name}: {found.problem}")
            else:
                shards.append(found.shard)
                statistics.merge(found.statistics)
                together |= found.together
            if progress is not None:
                progress(len(shards) + len(damaged), len(names))
        if damaged and not skip_damaged:
            raise DataError("damaged tars:\n  " + "\n  ".join(damaged) + "\nmend them, or leave them out with --skip")
        manifest = _manifest(store, shards, together, statistics, classes, damaged)
        store.write(SIZES, sizes_json(manifest).encode())
        store.write(FILE, manifest.as_json().encode())
        return manifest
    finally:
        store.close()


def _names(store: Store, pattern: str) -> list[str]:
    if pattern:
        from braceexpand import braceexpand

        return list(braceexpand(pattern))
    return tars(store.where, as_they_are=True)


def _looked_through(store: Store, names: Sequence[str]) -> Iterator[tuple[str, Found]]:
    """Look through tars in order, twice as many at once as there are cores: while one waits for a disk, another hashes.

    What is on this machine is looked through in processes: of threads only those that hash or wait can run at once.
    """
    workers = 2 * cores()
    with ExitStack() as stack:
        pool: Executor
        if isinstance(store, LocalStore) and sum(store.size(name) for name in names) > MUCH:
            pool = processes(workers, __name__)
        else:
            pool = ThreadPoolExecutor(workers)
        stack.callback(pool.shutdown, cancel_futures=True)
        try:
            yield from in_order(pool, functools.partial(_look_through, store), names, workers)
        except BrokenProcessPool as error:
            raise DataError(f"a worker died ({error}); was it killed for its memory?") from error


def _look_through(store: Store, name: str) -> Found:
    """Scan a tar, and write its index if it is whole."""
    try:
        with store.fetch(name) as path:
            found = scan(path, TEXTS)
            statistics = _measure(path, found)
    except OSError as error:
        raise DataError(f"cannot read {store.where}/{name}: {error}") from error
    shard = Shard(name, len(found.rows.keys), found.bytes, found.sha256)
    if not found.problem:
        # Waiting for the disk after each takes longer than hashing; a reader notices an index that is not whole.
        store.write(index_name(name), index_bytes(found.rows, shard, found.extensions), renewable=True)
    present = np.unique(found.rows.offset >= 0, axis=0) if shard.samples else ()
    together = {frozenset(e for e, there in zip(found.extensions, row, strict=True) if there) for row in present}
    return Found(shard, statistics, together, found.problem)


def _measure(path: os.PathLike[str], found: Scan) -> Statistics:
    """What can be said without decoding: sizes of images in bytes, lengths of captions, counts of labels."""
    statistics = Statistics()
    statistics.samples = len(found.rows.keys)
    column = {e: i for i, e in enumerate(found.extensions)}
    images = [found.rows.size[:, column[e]] for e in FIELDS["image"] if e in column]
    if images:
        size = functools.reduce(lambda one, other: np.where(one < 0, other, one), images)
        statistics.measure("image_bytes", size[size >= 0])
    texts = {e: _texts(path, found, column[e]) for e in ("txt", "cls") if e in column}
    captions = np.fromiter((len(text.decode("utf-8", "replace")) for text in texts.get("txt", ())), np.int64)
    statistics.measure("caption_length", captions)
    # There are few different labels: the bytes are counted first, and understood then.
    for text, count in Counter(texts.get("cls", ())).items():
        number = label_number(text)
        if number is not None:
            statistics.labels[number] += count
    return statistics


def _texts(path: os.PathLike[str], found: Scan, column: int) -> list[bytes]:
    """Contents of one column's members."""
    present = found.rows.offset[:, column] >= 0
    places, sizes = found.rows.offset[present, column].tolist(), found.rows.size[present, column].tolist()
    kept = [found.texts.get(place) for place in places]
    with open(path, "rb") as f:
        return [
            os.pread(f.fileno(), size, place) if text is None else text
            for text, place, size in zip(kept, places, sizes, strict=True)
        ]


def _manifest(
    store: Store,
    shards: list[Shard],
    together: set[frozenset[str]],
    statistics: Statistics,
    classes: Sequence[str],
    damaged: list[str],
) -> Manifest:
    known: dict[str, Any] = {"classes": (), "tokenizer": {}, "made": {}}
    try:
        old = parse(store.read(FILE).decode(), store.where, FILE)
        known = {"classes": old.classes, "tokenizer": old.tokenizer, "made": old.made}
    except (FileNotFoundError, DataError):
        pass
    if classes:
        known["classes"] = tuple(classes)
    elif not known["classes"] and statistics.labels:
        check_classes(max(statistics.labels), len(statistics.labels))
        known["classes"] = tuple(str(i) for i in range(max(statistics.labels) + 1))
    known["made"] = {**known["made"], "indexed": {"tars": len(shards), "left_out": damaged}}
    return Manifest(store.where, tuple(shards), fields_apart(together), statistics=statistics.as_json(), **known)


def fields_apart(together: Iterable[frozenset[str]]) -> dict[str, tuple[str, ...]]:
    """Fields from the sets of extensions that occur in one sample.

    Extensions of one field that occur side by side ("jpg" and "png" of one sample) are different things: the first in
    the order of ``FIELDS`` keeps the field's name, another one is a field named like itself.
    """
    sets = list(together)
    found = {e for s in sets for e in s}
    fields: dict[str, tuple[str, ...]] = {}
    for name, known in FIELDS.items():
        chosen: list[str] = []
        for extension in known:
            if extension in found and not any(extension in s and s & set(chosen) for s in sets):
                chosen.append(extension)
        if chosen:
            fields[name] = tuple(chosen)
    taken = {e for known in fields.values() for e in known}
    return fields | {e: (e,) for e in sorted(found - taken)}
