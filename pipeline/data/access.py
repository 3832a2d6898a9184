"""What reads the shards of a data set: a storage that fits where they lie, after a look at their sizes."""

from __future__ import annotations

import os

from pipeline.config.schema import Cache
from pipeline.core.errors import ConfigError
from pipeline.core.location import filesystem, is_url, join
from pipeline.core.manifest import Manifest, Shard
from pipeline.data.cache import Cached
from pipeline.data.storage import Local, Remote, Storage, missing, patiently, wrong_size


def open_storage(manifest: Manifest, cache: Cache | None = None) -> Storage:
    """What reads the shards of a data set.

    Args:
        manifest: the data set.
        cache: where whole shards of remote data sets are kept; None: they are read by ranges.

    Raises:
        ConfigError: the cache cannot hold the largest shard.
    """
    if not is_url(manifest.root):
        return Local(manifest.root)
    if cache is None:
        return Remote(manifest.root)
    largest, limit = max((s.bytes for s in manifest.shards), default=0), int(cache.limit_gb * 10**9)
    if largest > limit:
        raise ConfigError(f"data.cache.limit_gb = {cache.limit_gb:g} is less than a shard of {largest / 1e9:.3g} GB")
    # Of the shards that are alike in two data sets, each set keeps its own: only then is the name enough to know one.
    return Cached(manifest.root, f"{cache.folder}/{manifest.fingerprint}", limit)


def check_shard(manifest: Manifest, shard: Shard) -> None:
    """Raise DataError when a shard is missing or its size is not the manifest's."""
    where = f"{manifest.root.rstrip('/')}/{shard.name}"
    try:
        if is_url(manifest.root):
            files, path = filesystem(manifest.root)
            found = patiently(where, lambda: files.size(join(path, shard.name)))
        else:
            found = os.stat(where).st_size
    except OSError as error:
        raise missing(where, error) from error
    # A server need not say how long a file is.
    if found is not None and found != shard.bytes:
        raise wrong_size(where, found, shard)
