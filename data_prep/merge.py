"""Putting data sets together, their shards as they are, but for labels: where classes differ, these are renumbered.

Classes go by their names: the merged set has those of the first, and after them what each further one adds.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from data_prep.dataset import read_index, read_manifest
from data_prep.keys import Keys
from data_prep.relabel import renumber
from data_prep.shards import fields_of
from data_prep.statistics import Statistics
from data_prep.store import Store, open_store
from pipeline.core.classes import numbers_in, union
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.manifest import FILE, SIZES, Manifest, Shard, index_bytes, index_name, sizes_json


def merge(folders: Sequence[str], out: str, progress: Callable[[int, int], None] | None = None) -> Manifest:
    """Make one data set of several. On the same disk the shards are linked, otherwise copied; the inputs stay.

    Shards whose labels get other numbers are copied, and their labels written anew.

    Args:
        folders: Data sets, in order: folders or fsspec URLs.
        out: Folder or fsspec URL that is made.
        progress: Called with the number of shards brought over, and of all.

    Raises:
        ConfigError: ``out`` holds something else, or there is nothing to merge.
        DataError: classes without names meet others with, tokenizers differ, a key occurs twice.
    """
    if len(folders) < 2:
        raise ConfigError("merging takes at least two data sets")
    with ExitStack() as stack:
        stores = [stack.enter_context(closing(open_store(folder))) for folder in folders]
        target = stack.enter_context(closing(open_store(out)))
        manifests = [read_manifest(store) for store in stores]
        _check(stores, manifests)
        return _merge(stores, manifests, target, progress or (lambda done, total: None))


class _Part(NamedTuple):
    """One of the data sets."""

    store: Store
    manifest: Manifest
    numbers: list[int]
    """Of its classes, in the merged set; empty where they stay the same."""


def _merge(
    stores: Sequence[Store], manifests: Sequence[Manifest], target: Store, progress: Callable[[int, int], None]
) -> Manifest:
    classes = union((store.where, manifest.classes) for store, manifest in zip(stores, manifests, strict=True))
    parts = [_part(store, manifest, classes) for store, manifest in zip(stores, manifests, strict=True)]
    copies = {
        f"{number:03d}-{shard.name.replace('/', '-')}": (part, shard)
        for number, part in enumerate(parts)
        for shard in part.manifest.shards
    }
    _check_target(target, copies)
    carried = _carried(stores, manifests)
    shards: list[Shard] = []
    statistics = Statistics()
    for name, (part, shard) in copies.items():
        bring = _renumbered if part.numbers and "label" in part.manifest.fields else _as_it_is
        shards.append(bring(part, shard, target, name))
        progress(len(shards), len(copies))
    for part in parts:
        facts = Statistics.from_json(part.manifest.statistics)
        facts.renumber(part.numbers)
        statistics.merge(facts)
    made = [
        {"folder": p.store.where, "fingerprint": p.manifest.fingerprint}
        | ({"renumbered": p.numbers} if p.numbers else {})
        for p in parts
    ]
    merged = Manifest(
        root=target.where,
        shards=tuple(shards),
        fields=fields_of(sorted(carried), carried.__getitem__),
        classes=classes,
        statistics=statistics.as_json(),
        made={"merged": made},
        tokenizer=manifests[0].tokenizer,
        domain=manifests[0].domain if len({m.domain for m in manifests}) == 1 else "",
    )
    if merged.tokenizer:
        name = merged.tokenizer["file"]
        target.write(name, stores[0].read(name))
    target.write(SIZES, sizes_json(merged).encode())
    target.write(FILE, merged.as_json().encode())
    return merged


def _part(store: Store, manifest: Manifest, classes: Sequence[str]) -> _Part:
    """A data set with the numbers that its classes get."""
    numbers = [n for n in numbers_in(manifest.classes, classes) if n is not None]
    return _Part(store, manifest, numbers if numbers != list(range(len(numbers))) else [])


def _as_it_is(part: _Part, shard: Shard, target: Store, name: str) -> Shard:
    """Bring a shard and its index over."""
    target.write(index_name(name), part.store.read(index_name(shard.name)))
    with part.store.fetch(shard.name) as path:
        staged = target.staging(name)
        _link(path, staged)
        target.publish(staged, name)
    return replace(shard, name=name)


def _renumbered(part: _Part, shard: Shard, target: Store, name: str) -> Shard:
    """Bring a shard over with other labels, and write its index anew."""
    extensions = [e for known in part.manifest.fields.values() for e in known]
    index = read_index(part.store, replace(part.manifest, fields={e: (e,) for e in extensions}), shard)
    with part.store.fetch(shard.name) as path:
        staged = target.staging(name)
        staged.unlink(missing_ok=True)  # it may be a link to somebody's shard
        shutil.copyfile(path, staged)
    for extension in part.manifest.fields["label"]:
        index = renumber(staged, index, extensions.index(extension), part.numbers)
    with open(staged, "rb") as f:
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    brought = replace(shard, name=name, sha256=sha256)
    target.write(index_name(name), index_bytes(index, brought, extensions))
    target.publish(staged, name)
    return brought


def _check_target(target: Store, copies: Collection[str]) -> None:
    """What an interrupted merge of the same data sets left is no obstacle."""
    ours = {name for copy in copies for name in (copy, index_name(copy))}
    strange = [name for name in target.names("") if name not in ours and not name.startswith(".")]
    if strange:
        raise ConfigError(f"{target.where} is not empty: it holds {strange[0]}")


def _check(stores: Sequence[Store], manifests: Sequence[Manifest]) -> None:
    first = manifests[0]
    for store, manifest in zip(stores, manifests, strict=True):
        if "label" in manifest.fields and not manifest.classes and any(m.classes for m in manifests):
            raise DataError(
                f"{store.where} has labels and no classes: name them with `sluice prep index {store.where} "
                "--classes FILE`, or repack it with `sluice prep build tars`"
            )
        if manifest.tokenizer != first.tokenizer:
            raise DataError(f"{store.where} has another tokenizer than {first.root}; train one on the merged data")
    shards = [(s, m, shard) for s, m in zip(stores, manifests, strict=True) for shard in m.shards]
    keys = Keys()
    for store, manifest, shard in shards:
        keys.add(read_index(store, manifest, shard).keys)
    again = next(keys.repeated(lambda number: read_index(*shards[number]).keys), None)
    if again is not None:
        key, one, other = again
        places = f"{shards[one][0].where} and {shards[other][0].where}"
        raise DataError(f"key {key!r} is in {places}; `sluice prep build tars` renames")


def _carried(stores: Sequence[Store], manifests: Sequence[Manifest]) -> dict[str, str]:
    """Which field each extension carries: the same in all data sets.

    It is not decided by the extension alone: a "png" beside a "jpg" is a field of its own.
    """
    fields: dict[str, str] = {}
    for store, manifest in zip(stores, manifests, strict=True):
        for name, known in manifest.fields.items():
            for extension in known:
                if fields.setdefault(extension, name) != name:
                    raise DataError(
                        f".{extension} is field {name!r} in {store.where}, but {fields[extension]!r} in one before it; "
                        "repack with `sluice prep build tars`"
                    )
    return fields


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
