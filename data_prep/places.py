"""Files of a source: on this machine, or behind any URL that fsspec opens."""

from __future__ import annotations

import functools
import io
import os
import posixpath
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote, unquote

from data_prep.record import Rejected, file_stamp
from pipeline.core import location
from pipeline.core.errors import DataError
from pipeline.core.location import is_http, is_url, join
from pipeline.core.manifest import FILE


class Listed(NamedTuple):
    """A file in a folder."""

    name: str
    stamp: str
    """Changes when the file does, as far as its server tells; empty for local files, which are asked when read."""


@cache
def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, whose failures are all OSErrors, and the path of the URL in it.

    Raises:
        ConfigError: the package that reads such URLs is not installed.
    """
    files, path = location.filesystem(url)
    return _Careful(files), path


class _Careful:
    """A file system or one of its files; each kind of server has exceptions of its own."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return functools.partial(_asked, name, found) if callable(found) else found


def _asked(name: str, action: Callable[..., Any], /, *arguments: Any, **options: Any) -> Any:
    """What ``action`` gives.

    Raises:
        OSError: it failed, in whatever way.
    """
    try:
        return action(*arguments, **options)
    except (OSError, MemoryError):
        raise
    except NotImplementedError as error:
        raise OSError(f"{arguments[0] if arguments else name}: this kind of place cannot do that ({name})") from error
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


class _UrlBytes(io.RawIOBase):
    """A file behind a URL, whose failures are all OSErrors."""

    def __init__(self, file: Any) -> None:
        self._file = _Careful(file)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


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
    """Files and sub-folders directly in a folder, each by name; links count as what they lead to."""
    if not is_url(folder):
        with os.scandir(folder) as entries:
            # A link to itself is an error for e.is_dir.
            found = sorted((e.name, os.path.isdir(e.path) if e.is_symlink() else e.is_dir()) for e in entries)
        return [Listed(name, "") for name, leads in found if not leads], [name for name, leads in found if leads]
    files, path = filesystem(folder)
    described = sorted(files.ls(path, detail=True), key=lambda e: e["name"].rstrip("/"))
    named = [(name_of(e), e) for e in described]
    inside = [(name, e) for name, e in named if e["name"].rstrip("/") != path.rstrip("/")]
    return (
        [Listed(name, _stamp(e)) for name, e in inside if e["type"] == "file"],
        [name for name, e in inside if e["type"] == "directory"],
    )


def name_of(described: dict[str, Any]) -> str:
    """Name of a file or folder that fsspec describes, as it is called where it lies."""
    name = described["name"].rstrip("/").rsplit("/", 1)[-1]
    return unquote(name) if is_http(described["name"]) else name


def tars(folder: str, *, as_they_are: bool = False) -> list[str]:
    """Tars in a folder or, if it has none, in its sub-folders, but for hidden ones: by name, relative to it.

    A folder that several links lead to counts once.

    Args:
        folder: a folder or URL.
        as_they_are: sub-folders with a manifest are data sets of their own.

    Raises:
        DataError: no folder, no tars, or some in both; only in sub-folders that are data sets of their own.
    """
    if not is_folder(folder):
        raise DataError(f"no folder at {folder}")
    top, below, apart, seen = list[str](), list[str](), list[str](), set[str]()
    waiting = [""]
    while waiting:
        inside = waiting.pop()
        place = join(folder, inside)
        real = place if is_url(place) else os.path.realpath(place)
        if real in seen:
            continue
        seen.add(real)
        files, folders = listing(place)
        if inside and as_they_are and any(f.name == FILE for f in files):
            apart.append(inside)
            continue
        (below if inside else top).extend(inside + f.name for f in files if f.name.endswith(".tar"))
        waiting += [f"{inside}{name}/" for name in reversed(folders) if not name.startswith(".")]
    if top and below:
        raise DataError(
            f"tars are in {folder} and in sub-folders of it ({below[0]}): say which, as in {{000..099}}.tar"
        )
    if apart and not top:
        raise DataError(
            f"{folder}/{apart[0]} has a manifest of its own; give that folder, "
            "or put such folders together with `sluice prep merge`"
        )
    if not top and not below:
        raise DataError(f"no tars in {folder}")
    return top or below


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
    return io.BufferedReader(_UrlBytes(files.open(path, "rb")), 1 << 16)


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
    absolute = text.startswith(f"{root.rstrip('/')}/")
    below = text.removeprefix(f"{root.rstrip('/')}/")
    below = quote(below) if is_http(root) and not absolute else below
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
