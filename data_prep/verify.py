"""Does a data set keep its manifest's promises? Hashes, counts, offsets, keys, and if asked every image."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from data_prep import images
from data_prep.ahead import cores, in_order
from data_prep.dataset import read_manifest
from data_prep.keys import Keys
from data_prep.labels import label_number
from data_prep.record import Rejected
from data_prep.scan import Scan, scan
from data_prep.store import Store, open_store
from pipeline.core.errors import DataError
from pipeline.core.manifest import Manifest, Shard, index_name, parse_index

MOST = 5
"""Problems of one kind that are listed per shard."""


@dataclass
class Report:
    """What was found."""

    samples: int = 0
    shards: int = 0
    decoded: int = 0
    problems: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    """Shard (or file) name to what is wrong with it; empty when all is well."""

    def note(self, name: str, problems: list[str]) -> None:
        """Add problems of one file."""
        if problems:
            self.problems.setdefault(name, []).extend(problems)


def verify(folder: str, decode: float = 0.0, progress: Callable[[int], None] | None = None) -> Report:
    """Check a data set against its manifest.

    Args:
        folder: Folder or fsspec URL of one split.
        decode: Part of the samples whose content is decoded (images to the last pixel, labels, text), chosen by a hash
            of the key; 1: all.
        progress: Called with the number of shards looked through.

    Raises:
        DataError: there is no manifest to check against.
    """
    store = open_store(folder)
    try:
        manifest = read_manifest(store)
        report = Report()
        keys = Keys()
        threads = cores()
        with ThreadPoolExecutor(threads) as pool:
            work = functools.partial(_shard, store, manifest, decode)
            for shard, (found, problems, decoded) in in_order(pool, work, manifest.shards, 2 * threads):
                report.shards += 1
                report.samples += len(found)
                report.decoded += decoded
                report.note(shard.name, problems)
                keys.add(found)
                if progress is not None:
                    progress(report.shards)
        _check_keys(store, manifest, keys, report)
        _check_folder(store, manifest, report)
        return report
    finally:
        store.close()


def _shard(store: Store, manifest: Manifest, decode: float, shard: Shard) -> tuple[Sequence[str], list[str], int]:
    """Keys, problems, and samples decoded, of one shard."""
    try:
        with store.fetch(shard.name) as path:
            found = scan(path)
            keys = found.rows.keys
            problems = _compare(shard, found)
            if not problems:
                problems = _compare_index(store, manifest, shard, found)
            if problems:
                return keys, problems, 0
            return keys, *_decode(path, manifest, found, decode)
    except OSError as error:
        return (), [f"cannot be read: {error.strerror}"], 0


def _compare(shard: Shard, found: Scan) -> list[str]:
    problems: list[str] = []
    if found.problem:
        problems.append(found.problem)
    if found.bytes != shard.bytes:
        problems.append(f"has {found.bytes} bytes, the manifest promises {shard.bytes}")
    if len(found.rows.keys) != shard.samples:
        problems.append(f"has {len(found.rows.keys)} samples, the manifest promises {shard.samples}")
    if found.sha256 != shard.sha256:
        problems.append("its content has changed: another sha256 than the manifest's")
    return problems


def _compare_index(store: Store, manifest: Manifest, shard: Shard, found: Scan) -> list[str]:
    name = index_name(shard.name)
    try:
        there = parse_index(store.read(name), shard, manifest.fields, name)
    except FileNotFoundError:
        return [f"its index {name} is missing; renew it with `sluice prep index`"]
    except DataError as error:
        return [str(error)]
    rows = found.rows
    column = {e: i for i, e in enumerate(found.extensions)}
    same = there.keys == rows.keys
    for i, known in enumerate(manifest.fields.values()):
        columns = [column[e] for e in known if e in column]
        for mine, theirs in ((rows.offset, there.offset), (rows.size, there.size), (rows.crc32, there.crc32)):
            if mine is None or theirs is None:  # an index need not have checksums
                continue
            same = same and (mine[:, columns].max(1, initial=-1) == theirs[:, i]).all()
    return [] if same else [f"its index {name} points elsewhere; renew it with `sluice prep index`"]


def _decode(path: Path, manifest: Manifest, found: Scan, part: float) -> tuple[list[str], int]:
    problems: list[str] = []
    decoded = 0
    fields = {e: name for name, known in manifest.fields.items() for e in known}
    with open(path, "rb") as f:
        for key, offsets, sizes in zip(found.rows.keys, found.rows.offset, found.rows.size, strict=True):
            if int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:4]) >= part * 2**32:
                continue
            decoded += 1
            for extension, offset, size in zip(found.extensions, offsets.tolist(), sizes.tolist(), strict=True):
                if offset < 0:
                    continue
                problem = _content(os.pread(f.fileno(), size, offset), fields[extension], manifest)
                if problem:
                    problems.append(f"{key}.{extension}: {problem}")
    if len(problems) > MOST:
        problems = [*problems[:MOST], f"and {len(problems) - MOST} more"]
    return problems, decoded


def _content(data: bytes, field_name: str, manifest: Manifest) -> str:
    """What is wrong with one member; empty when nothing is."""
    if field_name == "image":
        try:
            images.decode(data)
        except Rejected as reason:
            return str(reason)
    elif field_name == "label" and manifest.classes:
        number = label_number(data)
        if number is None or number >= len(manifest.classes):
            shown = data.strip()[:40].decode("utf-8", "replace")
            return f"label {shown!r} is not one of {len(manifest.classes)} classes"
    elif field_name in ("caption", "metadata"):
        try:
            text = data.decode("utf-8-sig")
            if field_name == "metadata":
                json.loads(text)
        except ValueError as error:
            return str(error)
    return ""


def _check_keys(store: Store, manifest: Manifest, keys: Keys, report: Report) -> None:
    def read(number: int) -> Sequence[str]:
        with store.fetch(manifest.shards[number].name) as path:
            return scan(path).rows.keys

    problems: dict[int, list[str]] = {}
    for key, first, number in keys.repeated(read):
        problems.setdefault(number, []).append(f"key {key!r} is in {manifest.shards[first].name} too")
    for number, found in problems.items():
        more = [f"and {len(found) - MOST} more keys"] if len(found) > MOST else []
        report.note(manifest.shards[number].name, found[:MOST] + more)


def _check_folder(store: Store, manifest: Manifest, report: Report) -> None:
    promised = {s.name for s in manifest.shards}
    for name in store.names(""):
        if name.endswith(".tar") and name not in promised:
            report.note(name, ["is not in the manifest; remove it, or take it in with `sluice prep index`"])
    try:
        sizes = json.loads(store.read("sizes.json"))
    except (OSError, ValueError) as error:
        report.note("sizes.json", [f"cannot be read: {error}"])
        return
    if sizes != {s.name: s.samples for s in manifest.shards}:
        report.note("sizes.json", ["does not say what the manifest says"])
