"""Reading a prepared data set back, for the verbs that describe it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from data_prep import places
from data_prep.store import Store, open_store
from pipeline.core.errors import DataError
from pipeline.core.location import reason
from pipeline.core.manifest import FILE, FORMAT, Manifest, Shard, ShardIndex, index_name, instead_of, parse, parse_index

DONE = "build.json"
"""What a build writes last, beside the folders of its splits."""
_ABOVE = 3
"""Folders in which the manifest of a tar is looked for."""


class Item(NamedTuple):
    """One sample's content."""

    key: str
    fields: dict[str, bytes]
    """Of the fields that were asked for and that it has."""


def read_manifest(store: Store) -> Manifest:
    """The manifest in a store's folder.

    Raises:
        DataError: none there, or damaged.
    """
    where = f"{store.where}/{FILE}"
    try:
        text = store.read(FILE).decode()
    except OSError as error:
        raise DataError(f"no manifest at {where} ({reason(error)}); {instead_of(store.where)}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is damaged ({error}); rebuild it with `sluice prep index`") from error
    return parse(text, store.where, where)


def data_sets(folder: str) -> list[str]:
    """The data sets in a folder: itself, or the splits that a build wrote there."""
    store = open_store(folder)
    try:
        if FILE in store.names(""):
            return [folder]
        splits = json.loads(store.read(DONE))["splits"]
        return [f"{folder.rstrip('/')}/{split}" for split in splits] or [folder]
    except FileNotFoundError:
        return [folder]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}/{DONE} is damaged ({error!r}); name one of the folders with shards") from error
    finally:
        store.close()


class Manifests:
    """Finds the manifests that tars belong to; each is read once."""

    def __init__(self) -> None:
        self._read: dict[str, tuple[Manifest, frozenset[str]] | None] = {}

    def of(self, tar: str) -> Manifest | None:
        """The manifest in a tar's folder, or in one above which lists it; None where there is none.

        Raises:
            DataError: it is damaged.
        """
        folder, _, name = tar.rpartition("/")
        for above in range(_ABOVE):
            if folder not in self._read:
                self._read[folder] = _manifest_in(folder)
            there = self._read[folder]
            if there is not None:
                return there[0] if not above or name in there[1] else None
            folder, slash, last = folder.rpartition("/")
            if not slash or not last or folder.endswith("/"):
                break
            name = f"{last}/{name}"
        return None


def _manifest_in(folder: str) -> tuple[Manifest, frozenset[str]] | None:
    """A folder's manifest and the names of its shards; None where there is none, or another program's."""
    where = f"{folder or '.'}/{FILE}"
    if not places.exists(where):
        return None
    with places.opened(where) as f:
        text = f.read().decode("utf-8", "replace")
    if f'"{FORMAT}"' not in text[:200]:
        return None
    manifest = parse(text, folder or ".", where)
    return manifest, frozenset(shard.name for shard in manifest.shards)


def read_index(store: Store, manifest: Manifest, shard: Shard) -> ShardIndex:
    """A shard's index.

    Raises:
        DataError: none there, or damaged.
    """
    name = index_name(shard.name)
    try:
        data = store.read(name)
    except OSError as error:
        raise DataError(f"no index at {store.where}/{name}; renew it with `sluice prep index`") from error
    return parse_index(data, shard, manifest.fields, f"{store.where}/{name}")


def items(store: Store, manifest: Manifest, fields: Sequence[str], rows: Sequence[int] | None = None) -> Iterator[Item]:
    """Samples in order: all, or those of the given numbers (rising)."""
    columns = {name: i for i, name in enumerate(manifest.fields) if name in fields}
    wanted = iter(rows) if rows is not None else None
    row = next(wanted, None) if wanted is not None else None
    for shard, start in zip(manifest.shards, manifest.starts, strict=False):
        if wanted is None:
            inside: Sequence[int] = range(shard.samples)
        else:
            inside = []
            while row is not None and row < start + shard.samples:
                inside.append(row - start)
                row = next(wanted, None)
        if not inside:
            continue
        index = read_index(store, manifest, shard)
        with store.fetch(shard.name) as path, open(path, "rb") as f:
            for i in inside:
                found: dict[str, bytes] = {}
                for name, column in columns.items():
                    if index.offset[i, column] >= 0:
                        f.seek(index.offset[i, column])
                        found[name] = f.read(index.size[i, column])
                yield Item(index.keys[i], found)


def digest(data: bytes) -> str:
    """sha256 in hex."""
    return hashlib.sha256(data).hexdigest()
