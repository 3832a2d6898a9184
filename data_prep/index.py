"""Taking tars as they are into the house: a manifest and indexes beside them, the tars untouched."""

from __future__ import annotations

import functools
import json
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np

from data_prep.ahead import cores, in_order, processes
from data_prep.labels import check_classes, label_number
from data_prep.places import tars
from data_prep.scan import Scan, scan
from data_prep.statistics import Statistics
from data_prep.store import LocalStore, Store, open_store
from pipeline.core.classes import unnamed
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.location import expand, is_url
from pipeline.core.manifest import (
    FIELDS,
    FILE,
    FORMAT,
    SIZES,
    Manifest,
    Shard,
    index_bytes,
    index_name,
    parse,
    sizes_json,
)

MUCH = 512 * 1024**2
"""Bytes for which it is worth starting processes: they take as long as looking through so many."""
MAGIC = b"PK\x03\x04"
"""How an index begins: a file of numpy's."""
TEXTS = (b".txt", b".cls")
"""Members that are measured by their content."""


class Found(NamedTuple):
    """A tar that was looked through."""

    shard: Shard
    statistics: Statistics
    together: set[frozenset[str]]
    """Sets of extensions that occur in one sample."""
    no_class: int
    """Labels that are no numbers."""
    passed: Counter[str]
    """How many files of which kinds belong to no sample."""
    problem: str
    """What is wrong with it; empty when nothing is."""


def index(
    folder: str,
    *,
    pattern: str = "",
    classes: Sequence[str] = (),
    domain: str = "",
    image: str = "",
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
        domain: What its samples are called where several domains meet; empty: what the manifest says already.
        image: Extension of the member that is the image ("input.jpg"); empty: those that images have.
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
        no_class, passed = 0, Counter[str]()
        _check_ours(store)
        for name, found in _looked_through(store, names, image):
            if found.problem:
                damaged.append(f"{name}: {found.problem}")
            else:
                shards.append(found.shard)
                statistics.merge(found.statistics)
                together |= found.together
                no_class += found.no_class
                passed += found.passed
            if progress is not None:
                progress(len(shards) + len(damaged), len(names))
        if damaged and not skip_damaged:
            raise DataError("damaged tars:\n  " + "\n  ".join(damaged) + "\nmend them, or leave them out with --skip")
        fields = fields_apart(together, image)
        made = {"tars": len(shards), "left_out": damaged} | ({"passed_over": dict(passed)} if passed else {})
        manifest = _manifest(store, shards, fields, statistics, classes, domain, made, no_class)
        _check_sizes(store, manifest)
        store.write(SIZES, sizes_json(manifest).encode())
        store.write(FILE, manifest.as_json().encode())
        return manifest
    finally:
        store.close()


def _check_ours(store: Store) -> bool:
    """Whether there is a manifest of this program; ConfigError where it is another's."""
    try:
        ours = f'"{FORMAT}"'.encode() in store.read(FILE)
    except FileNotFoundError:
        return False
    if not ours:
        raise ConfigError(f"{store.where}/{FILE} is not Sluice's and would be replaced; move it away")
    return True


def _check_sizes(store: Store, manifest: Manifest) -> None:
    """Raise ConfigError for sizes that another program wrote, and that are not what will be written."""
    if _check_ours(store):
        return
    try:
        there = json.loads(store.read(SIZES))
    except FileNotFoundError:
        return
    except ValueError:
        there = None
    if there != json.loads(sizes_json(manifest)):
        raise ConfigError(f"{store.where}/{SIZES} is not Sluice's and says something else; move it away")


def _check_index(store: Store, name: str) -> None:
    """Raise ConfigError for an index that another program wrote."""
    try:
        beginning = store.read(index_name(name), most=len(MAGIC))
    except FileNotFoundError:
        return
    if beginning != MAGIC:
        raise ConfigError(
            f"{store.where}/{index_name(name)} is not Sluice's (DALI's have such names) and would be replaced; "
            "move it away, or link the tars into a folder of their own"
        )


def _names(store: Store, pattern: str) -> list[str]:
    """Names of the tars, relative to the folder, as a manifest holds them.

    Raises:
        ConfigError: some lie outside of the folder, or are named twice.
    """
    if not pattern:
        return tars(store.where, as_they_are=True)
    top = f"{store.where.rstrip('/')}/"
    names = [posixpath.normpath(name.removeprefix(top)) for name in expand(pattern)]
    outside = [name for name in names if name.startswith(("/", "../")) or is_url(name)]
    if outside:
        raise ConfigError(f"--tars names tars in {store.where} and below it, not {outside[0]!r}; give their folder")
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise ConfigError(f"--tars names {twice[0]!r} twice; a sample would be in the data set twice")
    return names


def _looked_through(store: Store, names: Sequence[str], image: str) -> Iterator[tuple[str, Found]]:
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
            yield from in_order(pool, functools.partial(_look_through, store, image), names, workers)
        except BrokenProcessPool as error:
            raise DataError(f"a worker died ({error}); was it killed for its memory?") from error


def _look_through(store: Store, image: str, name: str) -> Found:
    """Scan a tar, and write its index if it is whole."""
    _check_index(store, name)
    try:
        with store.fetch(name) as path:
            found = scan(path, TEXTS)
            statistics, no_class = _measure(path, found, (image,) if image else FIELDS["image"])
    except OSError as error:
        raise DataError(f"cannot read {store.where}/{name}: {error}") from error
    shard = Shard(name, len(found.rows.keys), found.bytes, found.sha256)
    if not found.problem:
        # Waiting for the disk after each takes longer than hashing; a reader notices an index that is not whole.
        store.write(index_name(name), index_bytes(found.rows, shard, found.extensions), renewable=True)
    present = np.unique(found.rows.offset >= 0, axis=0) if shard.samples else ()
    together = {frozenset(e for e, there in zip(found.extensions, row, strict=True) if there) for row in present}
    return Found(shard, statistics, together, no_class, found.passed, found.problem)


def _measure(path: os.PathLike[str], found: Scan, images: Sequence[str]) -> tuple[Statistics, int]:
    """What can be said without decoding: sizes of images in bytes, lengths of captions, counts of labels.

    Labels that are no numbers are counted apart.
    """
    statistics = Statistics()
    statistics.samples = len(found.rows.keys)
    column = {e: i for i, e in enumerate(found.extensions)}
    sizes = [found.rows.size[:, column[e]] for e in images if e in column]
    if sizes:
        size = functools.reduce(lambda one, other: np.where(one < 0, other, one), sizes)
        statistics.measure("image_bytes", size[size >= 0])
    texts = {e: _texts(path, found, column[e]) for e in ("txt", "cls") if e in column}
    captions = np.fromiter((len(text.decode("utf-8", "replace")) for text in texts.get("txt", ())), np.int64)
    statistics.measure("caption_length", captions)
    # There are few different labels: the bytes are counted first, and understood then.
    no_class = 0
    for text, count in Counter(texts.get("cls", ())).items():
        number = label_number(text)
        if number is not None:
            statistics.labels[number] += count
        else:
            no_class += count
    return statistics, no_class


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
    fields: dict[str, tuple[str, ...]],
    statistics: Statistics,
    classes: Sequence[str],
    domain: str,
    made: dict[str, Any],
    no_class: int,
) -> Manifest:
    known: dict[str, Any] = {"classes": (), "tokenizer": {}, "made": {}, "domain": ""}
    try:
        old = parse(store.read(FILE).decode(), store.where, FILE)
        known = {"classes": old.classes, "tokenizer": old.tokenizer, "made": old.made, "domain": old.domain}
    except (FileNotFoundError, DataError):
        pass
    known["domain"] = domain or known["domain"]
    known["classes"] = tuple(classes) or _for_all(known["classes"], statistics.labels)
    no_class += sum(times for label, times in statistics.labels.items() if label >= len(known["classes"]))
    known["made"] = {**known["made"], "indexed": made | ({"no_class": no_class} if no_class else {})}
    return Manifest(store.where, tuple(shards), fields, statistics=statistics.as_json(), **known)


def _for_all(classes: tuple[str, ...], labels: Counter[int]) -> tuple[str, ...]:
    """Classes for all labels: these, or, where they have no names anyway, as many as there are."""
    most = max(labels, default=-1)
    if most < len(classes) or not unnamed(classes):
        return classes
    check_classes(most, len(labels))
    return tuple(str(i) for i in range(most + 1))


def fields_apart(together: Iterable[frozenset[str]], image: str = "") -> dict[str, tuple[str, ...]]:
    """Fields from the sets of extensions that occur in one sample.

    Extensions of one field that occur side by side ("jpg" and "png" of one sample) are different things: the first in
    the order of ``FIELDS`` keeps the field's name, another one is a field named like itself.

    Args:
        together: The sets.
        image: The only extension of the images, where it is not for ``FIELDS`` to say.

    Raises:
        DataError: no member has that extension.
    """
    sets = list(together)
    found = {e for s in sets for e in s}
    if image and image not in found:
        raise DataError(f"no member is named .{image}, only {', '.join(f'.{e}' for e in sorted(found))}")
    fields: dict[str, tuple[str, ...]] = {}
    for name, known in (FIELDS | ({"image": (image,)} if image else {})).items():
        chosen: list[str] = []
        for extension in known:
            if extension in found and not any(extension in s and s & set(chosen) for s in sets):
                chosen.append(extension)
        if chosen:
            fields[name] = tuple(chosen)
    taken = {e for known in fields.values() for e in known}
    return fields | {e: (e,) for e in sorted(found - taken)}
