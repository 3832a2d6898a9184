"""Where a data set lies: a local folder, or any URL that fsspec opens. Nothing heavy is imported for local folders."""

from __future__ import annotations

import os
import re
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from pipeline.core.errors import ConfigError

SILENCE = 60.0
"""Seconds without a byte after which an HTTP server is given up."""

MOST_NAMES = 1_000_000
"""That a pattern may stand for."""
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")


def is_url(root: str) -> bool:
    """Whether a data set lies elsewhere than in a local folder."""
    return "://" in root


def is_http(root: str) -> bool:
    """Whether names in it are parts of an address, where some letters have a meaning of their own."""
    return root.startswith(("http://", "https://"))


def join(root: str, name: str) -> str:
    """Where the file of this name is, below a folder, a URL or its path in a file system."""
    return f"{root.rstrip('/')}/{quote(name) if is_http(root) else name}"


@cache
def filesystem(root: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path of the URL in it.

    Raises:
        ConfigError: the package that reads such URLs is not installed.
    """
    import fsspec  # pyright: ignore[reportMissingTypeStubs]

    options: dict[str, Any] = {}
    try:
        if is_http(root):
            import aiohttp

            options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(None, sock_connect=SILENCE, sock_read=SILENCE)}
        system, path = cast("Any", fsspec.core).url_to_fs(root, **options)
        return system, path
    except (ImportError, ValueError) as error:
        raise ConfigError(f"cannot read {root}: {error}; install the fsspec package for this kind of URL") from error


def read_file(root: str, name: str) -> bytes:
    """The content of a small file of a data set.

    Raises:
        OSError: it cannot be read.
        ConfigError: see :func:`filesystem`.
    """
    if not is_url(root):
        return (Path(root) / name).read_bytes()
    files, path = filesystem(root)
    try:
        return files.cat_file(join(path, name))
    except OSError:
        raise
    except Exception as error:  # each kind of server has exceptions of its own
        raise OSError(f"{type(error).__name__}: {error}") from error


def expand(pattern: str) -> list[str]:
    """The names that a pattern with braces stands for: ``{000..099}.tar``.

    Raises:
        ConfigError: its braces do not pair, or it stands for more than ``MOST_NAMES``.
    """
    from braceexpand import braceexpand

    try:
        # Of each range all numbers are made before the first name is there.
        if any(abs(int(last[:19]) - int(first[:19])) > MOST_NAMES for first, last in _RANGE.findall(pattern)):
            raise ValueError(f"more than {MOST_NAMES:,} names")
        names = list(islice(braceexpand(pattern), MOST_NAMES + 1))
        if len(names) > MOST_NAMES:
            raise ValueError(f"more than {MOST_NAMES:,} names")
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read the shard list {pattern[:200]!r}: {str(error)[:200]}") from error
    return names


def reason(error: OSError) -> str:
    """What the system says is wrong, without the path."""
    return error.strerror or (os.strerror(2) if isinstance(error, FileNotFoundError) else str(error))
