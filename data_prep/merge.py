"""Putting data sets of the same classes together, their shards as they are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from data_prep.dataset import read_index, read_manifest
from data_prep.keys import Keys
from data_prep.shards import fields_of
from data_prep.statistics import Statistics
from data_prep.store import Store, open_store
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.manifest import FILE, SIZES, Manifest, Shard, index_name, sizes_json


def merge(folders: Sequence[str], out: str, progress: Callable[[int, int], None] | None = None) -> Manifest:
    """Make one data set of several. On the same disk the shards are linked, otherwise copied; the inputs stay.

    Args:
        folders: Data sets, in order: folders or fsspec URLs.
        out: Folder or fsspec URL that is made.
        progress: Called with the number of shards brought over, and of all.

    Raises:
        ConfigError: ``out`` holds something else, or there is nothing to merge.
        DataError: classes or tokenizers differ, a key occurs twice.
    """
    if len(folders) < 2:
        raise ConfigError("merging takes at least two data sets")
    with ExitStack() as stack:
        stores = [stack.enter_context(closing(open_store(folder))) for folder in folders]
        target = stack.enter_context(closing(open_store(out)))
        manifests = [read_manifest(store) for store in stores]
        _check(stores, manifests)
        return _merge(stores, manifests, target, progress or (lambda done, total: None))


def _merge(
    stores: Sequence[Store], manifests: Sequence[Manifest], target: Store, progress: Callable[[int, int], None]
) -> Manifest:
    copies = {
        f"{number:03d}-{shard.name.replace('/', '-')}": (store, shard)
        for number, (store, manifest) in enumerate(zip(stores, manifests, strict=True))
        for shard in manifest.shards
    }
    _check_target(target, copies)
    carried = _carried(stores, manifests)
    shards: list[Shard] = []
    for name, (store, shard) in copies.items():
        target.write(index_name(name), store.read(index_name(shard.name)))
        with store.fetch(shard.name) as path:
            staged = target.staging(name)
            _link(path, staged)
            target.publish(staged, name)
        shards.append(replace(shard, name=name))
        progress(len(shards), len(copies))
    statistics = Statistics()
    for manifest in manifests:
        statistics.merge(Statistics.from_json(manifest.statistics))
    parts = [{"folder": s.where, "fingerprint": m.fingerprint} for s, m in zip(stores, manifests, strict=True)]
    merged = Manifest(
        root=target.where,
        shards=tuple(shards),
        fields=fields_of(sorted(carried), carried.__getitem__),
        classes=manifests[0].classes,
        statistics=statistics.as_json(),
        made={"merged": parts},
        tokenizer=manifests[0].tokenizer,
    )
    if merged.tokenizer:
        name = merged.tokenizer["file"]
        target.write(name, stores[0].read(name))
    target.write(SIZES, sizes_json(merged).encode())
    target.write(FILE, merged.as_json().encode())
    return merged


def _check_target(target: Store, copies: Collection[str]) -> None:
    """What an interrupted merge of the same data sets left is no obstacle."""
    ours = {name for copy in copies for name in (copy, index_name(copy))}
    strange = [name for name in target.names("") if name not in ours and not name.startswith(".")]
    if strange:
        raise ConfigError(f"{target.where} is not empty: it holds {strange[0]}")


def _check(stores: Sequence[Store], manifests: Sequence[Manifest]) -> None:
    first = manifests[0]
    for store, manifest in zip(stores, manifests, strict=True):
        if manifest.classes != first.classes:
            raise DataError(f"{store.where} has other classes than {first.root}; repack with `sluice prep build tars`")
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
