"""Writing a data set of given members, shard by shard, by several processes: what is computed for samples of another.

A shard is finished when its note is there, and is written by whoever computed it; killed at any time, what is finished
stays. The manifest comes last. The same members give the same bytes, however many processes wrote them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from data_prep.options import differences
from data_prep.shards import WORK, fields_of, shard_index
from data_prep.statistics import Statistics
from data_prep.store import open_store
from data_prep.ustar import NAME_LENGTH, TarWriter
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.manifest import FILE, SIZES, Manifest, Shard, index_bytes, index_name, parse, sizes_json

PLAN = f"{WORK}/plan.json"


class SidecarWriter:
    """One process's part in writing.

    Args:
        out: folder or fsspec URL.
        made: what the manifest will say of how it was made; plain JSON values.
        shards: how many there will be.
    """

    def __init__(self, out: str, made: Mapping[str, Any], shards: int) -> None:
        self._store = open_store(out)
        self._made: dict[str, Any] = json.loads(json.dumps(made))
        self._shards = shards

    def begin(self) -> bool:
        """Make the folder ready; one process does, before any writes. Returns whether all is written already.

        Raises:
            ConfigError: the folder holds something else.
        """
        names = self._store.names("")
        if FILE in names:
            found = parse(self._store.read(FILE).decode(), self._store.where, f"{self._store.where}/{FILE}")
            self._compare(found.made)
            return True
        try:
            self._compare(json.loads(self._store.read(PLAN)))
        except FileNotFoundError:
            if names:
                raise ConfigError(
                    f"{self._store.where} holds files of another origin, {names[0]}; use a new folder"
                ) from None
            self._store.write(PLAN, json.dumps(self._made).encode())
        return False

    def _compare(self, there: Mapping[str, Any]) -> None:
        if changed := list(differences(there, self._made)):
            raise ConfigError(
                f"{self._store.where} was made otherwise ({'; '.join(changed[:3])}); remove it, or "
                "write into a new folder"
            )

    def left(self) -> list[int]:
        """Numbers of the shards that are not finished."""
        there = {name.removesuffix(".json") for name in self._store.names(WORK)}
        return [number for number in range(self._shards) if f"{number:06d}" not in there]

    def write(self, number: int, keys: Sequence[str], members: Sequence[Sequence[tuple[str, bytes]]]) -> None:
        """Write a shard.

        Args:
            number: of the shard.
            keys: of its samples; none: there is nothing to write.
            members: of each sample the extension and content of each file.

        Raises:
            DataError: a key is too long for a tar.
        """
        for key, own in zip(keys, members, strict=True):
            if any(len(f"{key}.{extension}".encode()) > NAME_LENGTH for extension, _ in own):
                raise DataError(f"the key {key!r} is too long: with {own[0][0]!r} it has more than {NAME_LENGTH} bytes")
        name = f"{number:06d}.tar"
        note: dict[str, Any] = {"shard": None, "extensions": []}
        if keys:
            staged = self._store.staging(name)
            tar = TarWriter(staged)
            try:
                places = [tar.add(key, own) for key, own in zip(keys, members, strict=True)]
                sha256 = tar.finish()
            except BaseException:
                tar.abort()
                raise
            shard = Shard(name, len(keys), tar.bytes, sha256)
            extensions = sorted({place.extension for own in places for place in own})
            index = index_bytes(shard_index(keys, places, extensions), shard, extensions)
            self._store.write(index_name(name), index)
            self._store.publish(staged, name)
            note = {"shard": asdict(shard), "extensions": extensions}
        self._store.write(f"{WORK}/{number:06d}.json", json.dumps(note).encode())

    def finish(self) -> Manifest:
        """Write the manifest, when all shards are finished; one process does."""
        notes = [json.loads(self._store.read(f"{WORK}/{number:06d}.json")) for number in range(self._shards)]
        notes = [note for note in notes if note["shard"] is not None]
        manifest = Manifest(
            root=self._store.where,
            shards=tuple(Shard(**note["shard"]) for note in notes),
            fields=fields_of(sorted({extension for note in notes for extension in note["extensions"]})),
            statistics=_statistics(sum(note["shard"]["samples"] for note in notes)),
            made=self._made,
        )
        self._store.write(SIZES, sizes_json(manifest).encode())
        self._store.write(FILE, manifest.as_json().encode())
        self._store.remove(WORK)
        return manifest

    def close(self) -> None:
        """Remove what was staged and not published."""
        self._store.close()


def _statistics(samples: int) -> dict[str, Any]:
    """Of samples of which nothing is measured."""
    statistics = Statistics()
    statistics.samples = samples
    return statistics.as_json()
