"""The manifest: what a set of shards promises. Format, loading, atomic saving. No torch here.

A data set is a folder (or URL) with plain WebDataset tars, ``manifest.json``, ``sizes.json`` (for open_clip) and one
``SHARD.idx`` beside each tar with the offsets of its members (an npz of plain arrays). The number of a sample, its
``id``, is its place in the concatenation of the shards in the manifest's order.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipeline.core.errors import DataError
from pipeline.core.files import replace_file
from pipeline.core.location import expand, read_file, reason

if TYPE_CHECKING:
    import numpy as np

FORMAT = "sluice-manifest"
VERSION = 1
FILE = "manifest.json"
SIZES = "sizes.json"
"""Shard name to number of samples, as open_clip reads it."""
IMAGES = ("jpg", "jpeg", "png", "webp", "jpe", "jfif", "gif", "bmp", "tif", "tiff", "avif", "ppm", "pgm", "pbm", "pnm")
"""Extensions of images, wherever they lie; what is in them is told by their content (``core/image.py``)."""
FIELDS = {"image": IMAGES, "label": ("cls",), "caption": ("txt",), "metadata": ("json",)}
"""Fields with a name of their own; any other extension is a field named like itself."""


@dataclass(frozen=True)
class Shard:
    """One tar."""

    name: str
    """File name, relative to the manifest's folder."""
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """Where the members of one shard lie. S samples, F fields in the order of ``Manifest.fields``."""

    keys: tuple[str, ...]
    """WebDataset key of each sample (S)."""
    offset: np.ndarray
    """int64[S,F], byte offset of the member's data; -1 where the sample lacks the field."""
    size: np.ndarray
    """int64[S,F], bytes of the member's data; -1 where absent."""
    crc32: np.ndarray | None = None
    """int64[S,F], zlib's CRC-32 of the member's data, by which the stream notices bit rot; -1 where absent."""


@dataclass(frozen=True)
class Manifest:
    """What a set of shards promises."""

    root: str
    """Folder or URL that holds the shards; not stored in the file."""
    shards: tuple[Shard, ...]
    fields: dict[str, tuple[str, ...]]
    """Field name to the tar extensions that carry it: {"image": ("jpg", "png"), "label": ("cls",)}."""
    classes: tuple[str, ...] = ()
    statistics: dict[str, Any] = field(default_factory=dict[str, Any])
    made: dict[str, Any] = field(default_factory=dict[str, Any])
    """How it was made: source, options, seed, version."""
    tokenizer: dict[str, Any] = field(default_factory=dict[str, Any])
    """{"file": name beside the manifest, "sha256": its hash}; empty when none was trained."""
    domain: str = ""
    """What its samples are called where several domains meet; empty: its folder's name."""

    @cached_property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(s.samples for s in self.shards)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Id of each shard's first sample, and the total at the end (one more entry than shards)."""
        return tuple(accumulate((s.samples for s in self.shards), initial=0))

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of what decides the samples and their order; in every checkpoint and every result."""
        facts = {"fields": self.fields, "shards": [(s.name, s.samples, s.sha256) for s in self.shards]}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]

    def as_json(self) -> str:
        """The text of ``manifest.json``: the same manifest gives the same bytes."""
        body = {k: v for k, v in asdict(self).items() if k != "root" and (k != "domain" or v)}
        head = {"format": FORMAT, "version": VERSION, "samples": self.samples, "fingerprint": self.fingerprint}
        return json.dumps(head | body, indent=1) + "\n"


@dataclass(frozen=True)
class Joined(Manifest):
    """Several data sets as one. Ids run through the parts in order; fields are those that all parts have."""

    parts: tuple[Manifest, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the parts'."""
        return hashlib.sha256(" ".join(p.fingerprint for p in self.parts).encode()).hexdigest()[:32]


def join(parts: Sequence[Manifest]) -> Joined:
    """Data sets as one; its classes are empty where the parts' differ."""
    first = parts[0]
    return Joined(
        root=" + ".join(p.root for p in parts),
        shards=tuple(replace(s, name=f"{p.root.rstrip('/')}/{s.name}") for p in parts for s in p.shards),
        fields={f: e for f, e in first.fields.items() if all(f in p.fields for p in parts)},
        classes=first.classes if all(p.classes == first.classes for p in parts) else (),
        parts=tuple(parts),
    )


def parse(text: str, root: str, where: str) -> Manifest:
    """Read a manifest's text.

    Raises:
        DataError: not a manifest, of another version, or with parts missing or changed.
    """
    try:
        read = json.loads(text)
        body = cast("dict[str, Any]", read if isinstance(read, dict) else {})
        if body.get("format") != FORMAT:
            raise DataError(f"{where} is not a manifest; make one with `sluice prep index`")
        if body["version"] != VERSION:
            raise DataError(f"{where} has version {body['version']}, this program reads {VERSION}; rebuild it")
        _check(body)
        manifest = Manifest(
            root=root,
            shards=tuple(Shard(**s) for s in body["shards"]),
            fields={k: tuple(v) for k, v in body["fields"].items()},
            classes=tuple(body["classes"]),
            statistics=body["statistics"],
            made=body["made"],
            tokenizer=body["tokenizer"],
            domain=body.get("domain", ""),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where} is damaged ({error!r}); rebuild it with `sluice prep index`") from error
    if body.get("fingerprint") != manifest.fingerprint:
        raise DataError(f"{where} was changed by hand: its fingerprint does not fit its shards")
    return manifest


def _check(body: dict[str, Any]) -> None:
    """Raise ValueError, TypeError or KeyError for what is not of the right kind."""
    if any(type(body[name]) is not dict for name in ("fields", "statistics", "made", "tokenizer")):
        raise TypeError("fields, statistics, made and tokenizer are tables")
    words = [*body["classes"], *(e for extensions in body["fields"].values() for e in extensions)]
    if any(type(word) is not str for word in words):
        raise TypeError("classes and extensions are words")
    if type(body.get("domain", "")) is not str:
        raise TypeError("a domain is a word")
    seen: set[str] = set()
    for s in body["shards"]:
        name = s["name"]
        if type(name) is not str or not name or ".." in name.split("/") or name[0] == "/" or name in seen:
            raise ValueError(f"shard name {name!r} is not a unique path inside the folder")
        if any(type(s[count]) is not int or s[count] < 0 for count in ("samples", "bytes")):
            raise ValueError(f"{name}: samples and bytes are counts")
        if not re.fullmatch("[0-9a-f]{64}", s["sha256"]):
            raise ValueError(f"{name}: sha256 is not 64 hex digits")
        seen.add(name)


def load(folder: str | os.PathLike[str] | Sequence[os.PathLike[str]]) -> Manifest:
    """The manifest of a data set, or of some of its shards.

    Args:
        folder: a folder, or a URL that fsspec opens; with ``/x-{000..099}.tar`` at its end, only these shards. Several
            of them are joined.

    Raises:
        DataError: none there, damaged, or without the shards asked for.
    """
    if not isinstance(folder, (str, os.PathLike)):
        return join([load(part) for part in folder])
    root, _, pattern = os.fspath(folder).rpartition("/")
    if not pattern.endswith(".tar") or os.path.isdir(folder):
        root, pattern = os.fspath(folder), ""
    where = f"{root.rstrip('/')}/{FILE}"
    try:
        text = read_file(root, FILE).decode()
    except OSError as error:
        raise DataError(f"no manifest at {where} ({reason(error)}); {instead_of(root)}") from error
    except ValueError as error:
        raise DataError(f"{where} is damaged ({error}); rebuild it with `sluice prep index`") from error
    whole = parse(text, root, where)
    return _some(whole, pattern) if pattern else whole


def instead_of(root: str) -> str:
    """What to do about a folder or URL without a manifest."""
    below = [] if "://" in root else sorted(str(path.parent) for path in Path(root).glob(f"*/{FILE}"))
    if below:
        return f"there is one in {', '.join(below[:4])}{', ...' if below[4:] else ''}: name that folder instead"
    return f"build shards with `sluice prep build`, or index existing ones with `sluice prep index {root}`"


def _some(whole: Manifest, pattern: str) -> Manifest:
    """The shards that a pattern with braces names, in its order."""
    known = {s.name: s for s in whole.shards}
    names = [pattern] if pattern in known else expand(pattern)
    missing = [n for n in names if n not in known]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(names)} shards of {pattern!r} are not in the manifest of {whole.root}, "
            f"first {missing[0]!r}; it has {len(known)}, {whole.shards[0].name} to {whole.shards[-1].name}"
            if known
            else f"the manifest of {whole.root} has no shards"
        )
    if len(set(names)) < len(names):
        raise DataError(f"the shard list {pattern!r} names a shard twice")
    return replace(whole, shards=tuple(known[n] for n in names))


def sizes_json(manifest: Manifest) -> str:
    """The text of ``sizes.json``."""
    return json.dumps({s.name: s.samples for s in manifest.shards}, indent=1) + "\n"


def save(manifest: Manifest, folder: str | os.PathLike[str]) -> None:
    """Write ``sizes.json`` and then ``manifest.json``, each atomically."""
    replace_file(Path(folder) / SIZES, sizes_json(manifest).encode())
    replace_file(Path(folder) / FILE, manifest.as_json().encode())


def index_name(shard: str) -> str:
    """File name of a shard's index: ``x-000000.tar`` has ``x-000000.idx``."""
    return shard.removesuffix(".tar") + ".idx"


def index_bytes(index: ShardIndex, shard: Shard, extensions: Sequence[str]) -> bytes:
    """The content of a shard's index file: the same index gives the same bytes.

    In the file the columns are ``extensions``, as they are in the tar. The manifest says which field they make, so a
    shard keeps its file when the data set gets new fields.
    """
    import numpy as np

    def packed(words: Sequence[str]) -> np.ndarray:
        return np.frombuffer("\0".join(words).encode(), np.uint8)

    target = io.BytesIO()
    sha256 = np.frombuffer(bytes.fromhex(shard.sha256), np.uint8)
    arrays = {"extensions": packed(extensions), "keys": packed(index.keys), "offset": index.offset, "size": index.size}
    if index.crc32 is not None:
        arrays["crc32"] = index.crc32
    np.savez(target, allow_pickle=False, **arrays, sha256=sha256)
    return target.getvalue()


def parse_index(data: bytes, shard: Shard, fields: Mapping[str, Sequence[str]], where: str) -> ShardIndex:
    """Read a shard's index file; its columns become those of ``fields``. ``where`` names it in errors.

    Raises:
        DataError: damaged, or made for another content of the shard.
    """
    import zipfile

    import numpy as np

    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as body:
            keys, extensions = (_unpack(body[name].tobytes()) for name in ("keys", "extensions"))
            tables = {name: body[name] for name in ("offset", "size", "crc32") if name != "crc32" or name in body}
            sha256 = body["sha256"].tobytes().hex()
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{where} is damaged ({error!r}); renew it with `sluice prep index`") from error
    if sha256 != shard.sha256:
        raise DataError(f"{where} was made for another content of {shard.name}; renew it with `sluice prep index`")
    shape = (shard.samples, len(extensions))
    fits = len(keys) == shard.samples and all(
        a.dtype == np.int64 and a.shape == shape and (a >= -1).all() for a in tables.values()
    )
    if not fits or (tables["offset"] + tables["size"] > shard.bytes).any():
        raise DataError(f"{where} does not fit {shard.name} in the manifest; renew it with `sluice prep index`")
    # A sample has at most one of a field's extensions; -1 elsewhere, so the largest is the one.
    columns = [[extensions.index(e) for e in known if e in extensions] for known in fields.values()]
    by_field = {
        name: np.stack([a[:, c].max(1, initial=-1) for c in columns], 1) if columns else a[:, :0]
        for name, a in tables.items()
    }
    return ShardIndex(keys, **by_field)


def _unpack(data: bytes) -> tuple[str, ...]:
    return tuple(data.decode().split("\0")) if data else ()


def load_index(manifest: Manifest, shard: Shard) -> ShardIndex:
    """The index of one shard.

    Raises:
        DataError: missing, damaged, or made for another content of the shard.
    """
    name = index_name(shard.name)
    where = f"{manifest.root.rstrip('/')}/{name}"
    try:
        data = read_file(manifest.root, name)
    except OSError as error:
        raise DataError(f"no index at {where} ({reason(error)}); renew it with `sluice prep index`") from error
    return parse_index(data, shard, manifest.fields, where)
