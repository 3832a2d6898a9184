"""Putting data sets of the same classes together, their shards as they are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from data_prep.dataset import read_index, read_manifest
from data_prep.shards import fields_of
from data_prep.statistics import Statistics
from data_prep.store import LocalStore
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.manifest import Manifest, Shard, index_name, replace_file, save


def merge(folders: Sequence[str], out: str) -> Manifest:
    """Make one data set of several. On the same disk the shards are linked, otherwise copied; the inputs stay.

    Args:
        folders: Data sets, in order.
        out: Folder that is made.

    Raises:
        ConfigError: ``out`` exists, or there is nothing to merge.
        DataError: classes or tokenizers differ, a key occurs twice.
    """
    target = Path(out)
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{out} is not empty")
    if len(folders) < 2:
        raise ConfigError("merging takes at least two data sets")
    stores = [LocalStore(Path(folder)) for folder in folders]
    manifests = [read_manifest(store) for store in stores]
    _check(stores, manifests)
    target.mkdir(parents=True, exist_ok=True)
    shards: list[Shard] = []
    statistics = Statistics()
    for number, (folder, manifest) in enumerate(zip(folders, manifests, strict=True)):
        statistics.merge(Statistics.from_json(manifest.statistics))
        for shard in manifest.shards:
            name = f"{number:03d}-{shard.name.replace('/', '-')}"
            _link(Path(folder) / shard.name, target / name)
            _link(Path(folder) / index_name(shard.name), target / index_name(name))
            shards.append(Shard(name, shard.samples, shard.bytes, shard.sha256))
    merged = Manifest(
        root=out,
        shards=tuple(shards),
        fields=fields_of(sorted({e for m in manifests for known in m.fields.values() for e in known})),
        classes=manifests[0].classes,
        statistics=statistics.as_json(),
        made={"merged": [{"folder": f, "fingerprint": m.fingerprint} for f, m in zip(folders, manifests, strict=True)]},
        tokenizer=manifests[0].tokenizer,
    )
    if merged.tokenizer:
        name = merged.tokenizer["file"]
        replace_file(target / name, (Path(folders[0]) / name).read_bytes())
    save(merged, target)
    return merged


def _check(stores: Sequence[LocalStore], manifests: Sequence[Manifest]) -> None:
    first = manifests[0]
    keys: dict[str, str] = {}
    for store, manifest in zip(stores, manifests, strict=True):
        if manifest.classes != first.classes:
            raise DataError(f"{store.where} has other classes than {first.root}; repack with `sluice prep build tars`")
        if manifest.tokenizer != first.tokenizer:
            raise DataError(f"{store.where} has another tokenizer than {first.root}; train one on the merged data")
        for name in set(manifest.fields) & set(first.fields):
            kept = {*manifest.fields[name], *first.fields[name]}
            if set(fields_of(sorted(kept))) != {name}:
                raise DataError(f"{store.where} has another kind of field {name!r} than {first.root}")
        for shard in manifest.shards:
            for key in read_index(store, manifest, shard).keys:
                if key in keys:
                    raise DataError(
                        f"key {key!r} is in {keys[key]} and {store.where}; `sluice prep build tars` renames"
                    )
                keys[key] = store.where


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
