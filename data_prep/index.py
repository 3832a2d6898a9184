"""Taking tars as they are into the house: a manifest and indexes beside them, the tars untouched."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from data_prep.scan import Scan, scan
from data_prep.shards import field_of, shard_index
from data_prep.statistics import Facts, Statistics
from data_prep.store import Store, open_store
from data_prep.ustar import Member
from pipeline.core.errors import DataError
from pipeline.core.manifest import FIELDS, FILE, SIZES, Manifest, Shard, index_bytes, index_name, parse, sizes_json

THREADS = os.cpu_count() or 1
"""Hashing runs outside of Python's lock."""


def index(
    folder: str,
    *,
    pattern: str = "",
    classes: Sequence[str] = (),
    skip_damaged: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Look through the tars of a folder and write indexes, sizes.json and manifest.json beside them.

    Args:
        folder: Folder or fsspec URL. A manifest that is there already is renewed; its classes, tokenizer and history
            are kept.
        pattern: Which tars, with braces: ``{000..099}.tar``; empty: all of the folder, by name.
        classes: Names of the labels; left out, labels that are numbers name themselves.
        skip_damaged: Leave damaged tars out instead of stopping.
        progress: Called with the number of tars looked through.

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
        for name, (found, sums) in _scans(store, names):
            if found.problem:
                damaged.append(f"{name}: {found.problem}")
            else:
                shard = Shard(name, len(found.keys), found.bytes, found.sha256)
                shards.append(shard)
                statistics.merge(sums)
                together |= {frozenset(m.extension for m in members) for members in found.members}
                extensions = sorted({m.extension for members in found.members for m in members})
                rows = shard_index(found.keys, found.members, extensions)
                store.write(index_name(name), index_bytes(rows, shard, extensions))
            if progress is not None:
                progress(len(shards) + len(damaged))
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
    names = [name for name in store.names("") if name.endswith(".tar")]
    if not names:
        raise DataError(f"no tars in {store.where}")
    return names


def _scans(store: Store, names: Iterable[str]) -> Iterator[tuple[str, tuple[Scan, Statistics]]]:
    """Scan in threads, in order, a few ahead."""

    def one(name: str) -> tuple[Scan, Statistics]:
        try:
            with store.fetch(name) as path:
                found = scan(path)
                return found, _measure(path, found.members)
        except OSError as error:
            raise DataError(f"cannot read {store.where}/{name}: {error}") from error

    with ThreadPoolExecutor(THREADS) as pool:
        ahead: deque[tuple[str, Future[tuple[Scan, Statistics]]]] = deque()
        for name in names:
            ahead.append((name, pool.submit(one, name)))
            if len(ahead) > THREADS:
                first, future = ahead.popleft()
                yield first, future.result()
        while ahead:
            first, future = ahead.popleft()
            yield first, future.result()


def _measure(path: os.PathLike[str], members: Sequence[Sequence[Member]]) -> Statistics:
    """What can be said without decoding: sizes of images in bytes, lengths of captions, counts of labels."""
    statistics = Statistics()
    with open(path, "rb") as f:
        descriptor = f.fileno()
        for sample in members:
            image = next((m.size for m in sample if field_of(m.extension) == "image"), None)
            caption = label = None
            for m in sample:
                if m.extension == "txt":
                    caption = len(os.pread(descriptor, m.size, m.offset).decode("utf-8", "replace"))
                elif m.extension == "cls":
                    text = os.pread(descriptor, m.size, m.offset).strip()
                    label = int(text) if text.isdigit() else None
            statistics.add(Facts(None, None, image, caption, label))
    return statistics


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
