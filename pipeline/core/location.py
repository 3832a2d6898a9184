"""Where a data set lies: a local folder, or any URL that fsspec opens. Nothing heavy is imported for local folders."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any, cast

from pipeline.core.errors import ConfigError

SILENCE = 60.0
"""Seconds without a byte after which an HTTP server is given up."""


def is_url(root: str) -> bool:
    """Whether a data set lies elsewhere than in a local folder."""
    return "://" in root


@cache
def filesystem(root: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path of the URL in it.

    Raises:
        ConfigError: the package that reads such URLs is not installed.
    """
    import fsspec  # pyright: ignore[reportMissingTypeStubs]

    options: dict[str, Any] = {}
    try:
        if root.startswith(("http://", "https://")):
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
        return files.cat_file(f"{path.rstrip('/')}/{name}")
    except OSError:
        raise
    except Exception as error:  # each kind of server has exceptions of its own
        raise OSError(f"{type(error).__name__}: {error}") from error


def reason(error: OSError) -> str:
    """What the system says is wrong, without the path."""
    return error.strerror or (os.strerror(2) if isinstance(error, FileNotFoundError) else str(error))
