"""What a build is asked to do. Everything here but ``workers`` decides the bytes that are written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pipeline.core.errors import ConfigError

_LONGEST = 24 * 3600
"""Seconds that a download may be waited for, or between two attempts."""


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


@dataclass(frozen=True)
class ImageOptions:
    """How images are stored."""

    format: Literal["keep", "jpg", "webp", "png"] = "keep"
    """"keep" stores the input's bytes where every decoder agrees on them (see data_prep/images.py)."""
    quality: int = 90
    """JPEG and WebP quality."""
    resize: Literal["none", "short", "long", "crop"] = "none"
    """Make the short side, or the long side, ``size``; or fill a square of ``size`` and cut its centre."""
    size: int = 0
    """Pixels."""
    enlarge: bool = False
    """Also resize images that are smaller than ``size``."""

    def __post_init__(self) -> None:
        _need(1 <= self.quality <= 100, f"quality is 1 to 100, not {self.quality}")
        _need(self.format in ("keep", "jpg", "webp", "png"), f"format is keep, jpg, webp or png, not {self.format!r}")
        _need(self.resize in ("none", "short", "long", "crop"), f"resize is none, short, long or crop: {self.resize!r}")
        _need((self.size > 0) == (self.resize != "none"), "resize and size go together: give both or neither")
        _need(not self.enlarge or self.resize != "none", "enlarging is a way of resizing: give resize and size as well")
        _need(self.resize == "none" or self.format != "keep", "resizing needs a format to store: jpg, webp or png")


@dataclass(frozen=True)
class Filters:
    """What is rejected. Zero and empty mean no limit."""

    min_side: int = 0
    """Least pixels of the shorter side, before resizing."""
    max_aspect: float = 0.0
    """Largest ratio of the longer to the shorter side."""
    min_area: int = 0
    max_area: int = 0
    """Pixels, before resizing."""
    min_caption: int = 0
    max_caption: int = 0
    """Characters; a sample without a caption has 0."""
    caption: str = ""
    """Regular expression that the caption must match somewhere."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.caption)
        except re.error as error:
            raise ConfigError(f"the caption pattern {self.caption!r} is no regular expression: {error}") from error
        _need(self.max_aspect == 0 or self.max_aspect >= 1, "max_aspect is longer over shorter side: at least 1")


@dataclass(frozen=True)
class Duplicates:
    """What happens to a sample like an earlier one."""

    action: Literal["off", "report", "drop"] = "off"
    distance: int = -1
    """Also look alike: bits of 64 by which perceptual hashes may differ (0 to 15); -1: only equal bytes or pixels."""

    def __post_init__(self) -> None:
        _need(self.action in ("off", "report", "drop"), f"duplicates are off, report or drop, not {self.action!r}")
        _need(self.distance < 0 or self.action != "off", "a distance is of duplicates: report or drop them")
        _need(-1 <= self.distance <= 15, f"a perceptual distance is 0 to 15 bits, not {self.distance}")


@dataclass(frozen=True)
class FetchOptions:
    """Limits of downloading."""

    concurrency: int = 32
    timeout: float = 20.0
    """Seconds for one attempt, from resolving the name to the last byte, redirects included; not for waiting for the
    host's turn (``per_host``)."""
    max_bytes: int = 32 * 1024**2
    retries: int = 2
    """Further attempts after a time-out, a broken connection, or an answer 429 or 5xx."""
    backoff: float = 0.5
    """Seconds before the first retry; twice as many before each next."""
    redirects: int = 5
    per_host: float = 10.0
    """Requests per second to one host."""
    private: bool = False
    """Allow private, loopback and link-local addresses."""
    robots: bool = True
    """Leave out what ``X-Robots-Tag`` keeps from indexing or AI."""
    agent: str = "sluice-prep"

    def __post_init__(self) -> None:
        positive = (self.concurrency, self.timeout, self.max_bytes, self.per_host)
        ok = all(n > 0 for n in positive) and all(n >= 0 for n in (self.retries, self.backoff, self.redirects))
        _need(ok, f"limits of downloading must be positive: {self}")
        # What a socket and a sleep can be told, which a time without end is not.
        _need(max(self.timeout, self.backoff) <= _LONGEST, f"at most {_LONGEST:,} seconds are waited: {self}")


@dataclass(frozen=True)
class Options:
    """What a build is asked to do."""

    splits: Mapping[str, float] = field(default_factory=lambda: {"val": 0.05})
    """Part of the samples in each split beside "train", decided by a hash of the sample's identity."""
    seed: int = 0
    shard_samples: int = 1000
    shard_bytes: int = 256 * 1024**2
    """A shard ends before it would exceed either; one sample may be larger than ``shard_bytes``."""
    image: ImageOptions = ImageOptions()
    filters: Filters = Filters()
    duplicates: Duplicates = Duplicates()
    fetch: FetchOptions | None = None
    """How URLs are downloaded; without it they are rejected."""
    workers: int = 0
    """Processes that read and encode; 0: this one does. The result is the same."""
    domain: str = ""
    """What the manifests call the domain of all samples."""

    def __post_init__(self) -> None:
        _need(self.shard_samples > 0 and self.shard_bytes > 0, "shards hold at least one sample and one byte")
        _need(self.workers >= 0, f"workers is a count, not {self.workers}")
        named = all(re.fullmatch("[A-Za-z0-9_-]+", name) and name != "train" for name in self.splits)
        _need(named, f"splits are named in letters and digits, and 'train' is what is left over: {dict(self.splits)}")
        parts = list(self.splits.values())
        _need(all(0 <= p <= 1 for p in parts) and sum(parts) <= 1, f"parts of splits add up to at most 1: {parts}")

    def facts(self) -> dict[str, Any]:
        """Plain JSON values of all that decides the result."""
        facts = {name: value for name, value in asdict(self).items() if name != "workers"}
        return facts if self.domain else {name: value for name, value in facts.items() if name != "domain"}


def differences(there: Mapping[str, Any], here: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """What differs between two tables of plain values, one line each."""
    for key in sorted({*there, *here}):
        old, new = there.get(key), here.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{path}{key}.")
        elif old != new:
            yield f"{path}{key}: {old!r} there, {new!r} now"
