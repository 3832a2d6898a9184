"""Files of a source: on this machine, or behind any URL that fsspec opens."""

from __future__ import annotations

import os
import posixpath
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, BinaryIO, NamedTuple, cast

from data_prep.record import Rejected, file_stamp
from pipeline.core.errors import ConfigError


class Listed(NamedTuple):
    """A file in a folder."""

    name: str
    stamp: str
    """Changes when the file does, as far as its server tells; empty for local files, which are asked when read."""


def is_url(place: str) -> bool:
    """Whether a place is not a local path."""
    return "://" in place


@cache
def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path of the URL in it.

    Raises:
        ConfigError: the package that reads such URLs is not installed.
    """
    import fsspec  # pyright: ignore[reportMissingTypeStubs]

    try:
        return cast("Any", fsspec.core).url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"cannot open {url}: {error}; install fsspec and the package for this scheme") from error


def exists(place: str) -> bool:
    """Whether there is a file or folder."""
    if not is_url(place):
        return os.path.exists(place)
    files, path = filesystem(place)
    return files.exists(path)


def is_folder(place: str) -> bool:
    """Whether this is a folder."""
    if not is_url(place):
        return os.path.isdir(place)
    files, path = filesystem(place)
    return files.isdir(path)


def listing(folder: str) -> tuple[list[Listed], list[str]]:
    """Files and sub-folders directly in a folder, each by name; links to folders count as neither."""
    if not is_url(folder):
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda e: e.name)
        links = [Listed(e.name, "") for e in found if not e.is_dir()]
        return links, [e.name for e in found if e.is_dir(follow_symlinks=False)]
    files, path = filesystem(folder)
    described = sorted(files.ls(path, detail=True), key=lambda e: e["name"].rstrip("/"))
    named = [(e["name"].rstrip("/").rsplit("/", 1)[-1], e) for e in described]
    inside = [(name, e) for name, e in named if e["name"].rstrip("/") != path.rstrip("/")]
    return (
        [Listed(name, _stamp(e)) for name, e in inside if e["type"] == "file"],
        [name for name, e in inside if e["type"] == "directory"],
    )


def _stamp(described: dict[str, Any]) -> str:
    marks = ("ETag", "etag", "LastModified", "last_modified", "mtime", "created")
    return f"{described['size']}:{next((described[m] for m in marks if described.get(m)), '')}"


def stamp(place: str) -> str:
    """What changes when a file does."""
    if not is_url(place):
        return file_stamp(place)
    files, path = filesystem(place)
    return _stamp(files.info(path))


def opened(place: str) -> BinaryIO:
    """A file to be read from front to back, or wherever."""
    if not is_url(place):
        return open(place, "rb")
    files, path = filesystem(place)
    return files.open(path, "rb")


@contextmanager
def local(place: str) -> Iterator[str]:
    """A file on this machine: itself, or a copy for as long as the context lasts."""
    if not is_url(place):
        yield place
        return
    files, path = filesystem(place)
    with tempfile.TemporaryDirectory(prefix="sluice-prep-") as folder:
        here = os.path.join(folder, "file")
        files.get_file(path, here)
        yield here


def inside(text: str, root: str) -> str | None:
    """The URL of what ``text`` names below the URL ``root``, or None if it leads out of it."""
    scheme, _, top = root.rstrip("/").partition("://")
    below = text.removeprefix(f"{root.rstrip('/')}/")
    path = posixpath.normpath(posixpath.join(top, below))
    return f"{scheme}://{path}" if path.startswith(f"{top}/") else None


@dataclass(frozen=True, slots=True)
class UrlFile:
    """A file behind a URL."""

    url: str

    def read(self) -> bytes:
        """The content. One that is not there is rejected; a server that fails stops the build."""
        files, path = filesystem(self.url)
        try:
            return files.cat_file(path)
        except FileNotFoundError as error:
            raise Rejected("no such file") from error
