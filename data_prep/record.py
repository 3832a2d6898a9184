"""What sources give: records that name a sample without holding its image, and safe unique keys for them."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

KEY_LENGTH = 80
"""Longest key in bytes: with the longest extension it still fits a tar header's 100."""
FILE_BYTES = 1024**3
"""Largest file that is taken for an image: any with as many pixels as are allowed is smaller."""
_UNSAFE = re.compile(rb"[^A-Za-z0-9_\-]")


class Rejected(Exception):
    """This sample cannot be used. The message is the reason, written to ``rejects.jsonl``."""


class Payload(Protocol):
    """Where the bytes of an image come from; read in a worker, so it must be picklable and small."""

    def read(self) -> bytes:
        """The encoded image.

        Raises:
            Rejected: this one cannot be had.
        """
        ...


@dataclass(frozen=True, slots=True)
class Inline:
    """Bytes that the source already holds."""

    data: bytes

    def read(self) -> bytes:
        """The bytes."""
        return self.data


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file on this machine."""

    path: str

    def read(self) -> bytes:
        """The file's content. A file that vanished or may not be read stops the build: OSError passes through."""
        status = os.stat(self.path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise Rejected("not a regular file")
        if status.st_size > FILE_BYTES:
            raise Rejected(f"{status.st_size} bytes, most is {FILE_BYTES}")
        with open(self.path, "rb") as f:
            return f.read()


@dataclass(frozen=True, slots=True)
class Record:
    """One input sample."""

    key: str
    """WebDataset key: unique in the source, safe as a path (see :func:`safe_key`)."""
    identity: str
    """What decides the sample's split: the same whatever other data there is."""
    image: Payload
    stamp: str = ""
    """Changes when the input changes: size and time of a file, hash of inline bytes."""
    label: int | None = None
    caption: str | None = None
    more: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    """Further members by their extension, "alt.txt": written as they are."""
    metadata: Mapping[str, Any] | None = None
    split: str | None = None
    """Set by sources that come with splits; otherwise a hash of the identity decides."""


class Source(Protocol):
    """An ordered, repeatable stream of records."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels; empty without labels."""
        ...

    @property
    def total(self) -> int | None:
        """Number of records, where it can be known beforehand; of long text files about that many."""
        ...

    @property
    def positional(self) -> bool:
        """Keys are places in the source; added to a data set, they get the number of the addition before them."""
        ...

    def describe(self) -> dict[str, Any]:
        """What was asked for, as plain JSON values: kept in the manifest and compared when a build is resumed."""
        ...

    def __iter__(self) -> Iterator[Record]:
        """All records, in an order that depends on the input alone."""
        ...


def safe_key(text: str) -> str:
    """A name that can escape from no folder and holds no dot, and differs whenever ``text`` differs.

    Slashes separate folders and stay; all other bytes but ASCII letters, digits, ``_`` and ``-`` become ``%XX``.
    What would be too long keeps its beginning and gets a hash.
    """
    parts = [p for p in text.split("/") if p]
    lossless = "/".join(parts) == text
    key = "/".join(_UNSAFE.sub(_percent, p.encode("utf-8", "surrogateescape")).decode() for p in parts)
    if len(key) > KEY_LENGTH or not lossless or not key:
        digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:20]
        key = f"{key[: KEY_LENGTH - 21].rstrip('/')}~{digest}"
    return key


def _percent(match: re.Match[bytes]) -> bytes:
    return b"%%%02X" % match.group()[0]


def split_of(identity: str, splits: Mapping[str, float], seed: int) -> str:
    """The split that ``identity`` falls into; what is in none of ``splits`` is in "train".

    Each split draws from what the ones before it left, by a hash of its own name: so a split of a split is as random
    as the first one was.
    """
    left = 1.0
    for name, part in splits.items():
        digest = hashlib.sha256(f"{seed}\0{name}\0{identity}".encode("utf-8", "surrogatepass")).digest()
        if int.from_bytes(digest[:8], "big") / 2**64 * left < part:
            return name
        left -= part
    return "train"


def readable(text: str) -> str:
    """The same text where all of it is; bytes of a file's name that are no UTF-8 become ``\\udcXX``."""
    return text.encode("utf-8", "backslashreplace").decode()


def extension_of(name: str) -> str:
    """Of a file's name, in lower case: "jpg"; empty without a dot in its last part."""
    return name.rpartition(".")[2].lower() if "." in name.rpartition("/")[2] else ""


def shortened(text: str, most: int) -> str:
    """The text, or its beginning and how long it is: what a line of a report shows of what may be a whole file."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def captions_of(value: Any) -> dict[str, str]:
    """Extension and text of each caption in a value of the metadata: a text, or a list of texts."""
    values = cast("list[Any]", value) if isinstance(value, list) else [value]
    texts = [text.strip() for text in values if isinstance(text, str) and text.strip()]
    return {f"{i}.txt" if i else "txt": text for i, text in enumerate(texts)}


def file_stamp(path: str | os.PathLike[str]) -> str:
    """Size and time of change of a file."""
    status = os.stat(path)
    return f"{status.st_size}:{status.st_mtime_ns}"
