"""Where a build writes: a local folder, or any fsspec target. Names appear whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

from data_prep.places import filesystem, name_of
from pipeline.core.errors import ConfigError
from pipeline.core.files import replace_file, sync_folder
from pipeline.core.location import is_url, join


class Store(Protocol):
    """A folder of named files; names hold "/" for sub-folders."""

    where: str

    def lock(self, name: str) -> None:
        """Keep other processes out until :meth:`close`, where the target allows it.

        Raises:
            ConfigError: another process is at work.
        """
        ...

    def names(self, folder: str) -> list[str]:
        """Files directly in ``folder`` (names relative to it), sorted; empty when there is none."""
        ...

    def read(self, name: str, most: int | None = None) -> bytes:
        """A file, or its first bytes. Raises FileNotFoundError."""
        ...

    def fetch(self, name: str) -> AbstractContextManager[Path]:
        """A large file as a local one, for as long as the context lasts. Raises FileNotFoundError."""
        ...

    def write(self, name: str, data: bytes, renewable: bool = False) -> None:
        """Write a small file atomically; one that is ``renewable`` may be lost if the power fails soon after."""
        ...

    def staging(self, name: str) -> Path:
        """A local path for a large file that will be published as ``name``."""
        ...

    def publish(self, staged: Path, name: str) -> None:
        """Bring a finished local file, already on disk, under its name atomically."""
        ...

    def remove(self, folder: str) -> None:
        """Remove a folder and all in it, if it is there."""
        ...

    def close(self) -> None:
        """Remove what was staged and not published."""
        ...


class LocalStore:
    """A folder on this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.where = str(root)
        self._staged: set[Path] = set()
        self._lock: int | None = None

    def lock(self, name: str) -> None:
        """See :class:`Store`. The lock ends with the process, however that ends."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another process is building {self.where}; wait for it, or stop it") from error

    def names(self, folder: str) -> list[str]:
        """See :class:`Store`."""
        try:
            return sorted(e.name for e in os.scandir(self.root / folder) if e.is_file())
        except FileNotFoundError:
            return []

    def read(self, name: str, most: int | None = None) -> bytes:
        """See :class:`Store`."""
        with open(self.root / name, "rb") as f:
            return f.read(most)

    def size(self, name: str) -> int:
        """Bytes of a file; 0 where there is none."""
        try:
            return (self.root / name).stat().st_size
        except FileNotFoundError:
            return 0

    def fetch(self, name: str) -> AbstractContextManager[Path]:
        """See :class:`Store`."""
        return nullcontext(self.root / name)

    def write(self, name: str, data: bytes, renewable: bool = False) -> None:
        """See :class:`Store`."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not renewable:
            replace_file(path, data)
            return
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            part.write_bytes(data)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def staging(self, name: str) -> Path:
        """See :class:`Store`. Always the same name, so that what a killed process left is overwritten."""
        path = (self.root / name).with_name(f".{Path(name).name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._staged.add(path)
        return path

    def publish(self, staged: Path, name: str) -> None:
        """See :class:`Store`."""
        os.replace(staged, self.root / name)
        staged.unlink(missing_ok=True)  # if both were links to one file, renaming left them so
        self._staged.discard(staged)
        sync_folder((self.root / name).parent)

    def remove(self, folder: str) -> None:
        """See :class:`Store`."""
        shutil.rmtree(self.root / folder, ignore_errors=False) if (self.root / folder).exists() else None

    def close(self) -> None:
        """See :class:`Store`."""
        for path in self._staged:
            path.unlink(missing_ok=True)
        self._staged.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class RemoteStore:
    """An fsspec target. Object stores make an upload visible when it is complete; elsewhere a rename does."""

    def __init__(self, url: str) -> None:
        self._fs, self._root = filesystem(url)
        self.where = url
        self._spool = Path(tempfile.mkdtemp(prefix="sluice-prep-"))

    def lock(self, name: str) -> None:
        """See :class:`Store`. Object stores have no locks."""

    def names(self, folder: str) -> list[str]:
        """See :class:`Store`."""
        try:
            entries = self._fs.ls(join(self._root, folder).rstrip("/"), detail=True, refresh=True)
        except FileNotFoundError:
            return []
        return sorted(name_of(e) for e in entries if e["type"] == "file")

    def read(self, name: str, most: int | None = None) -> bytes:
        """See :class:`Store`."""
        return self._fs.cat_file(join(self._root, name), end=most)[:most]

    @contextmanager
    def fetch(self, name: str) -> Iterator[Path]:
        """See :class:`Store`."""
        path = self.staging(name)
        self._fs.get_file(join(self._root, name), str(path))
        try:
            yield path
        finally:
            path.unlink()

    def write(self, name: str, data: bytes, renewable: bool = False) -> None:
        """See :class:`Store`."""
        staged = self.staging(name)
        staged.write_bytes(data)
        self.publish(staged, name)

    def staging(self, name: str) -> Path:
        """See :class:`Store`."""
        return self._spool / name.replace("/", "%")

    def publish(self, staged: Path, name: str) -> None:
        """See :class:`Store`."""
        final = join(self._root, name)
        part = f"{final}.part"
        self._fs.makedirs(final.rsplit("/", 1)[0], exist_ok=True)
        self._fs.put_file(str(staged), part)
        self._fs.mv(part, final)
        staged.unlink()

    def remove(self, folder: str) -> None:
        """See :class:`Store`."""
        if self._fs.exists(join(self._root, folder)):
            self._fs.rm(join(self._root, folder), recursive=True)

    def close(self) -> None:
        """See :class:`Store`."""
        shutil.rmtree(self._spool)


def open_store(target: str | os.PathLike[str]) -> Store:
    """The store for a folder or URL.

    Raises:
        ConfigError: a URL without the package that reads it.
    """
    text = os.fspath(target)
    return RemoteStore(text) if is_url(text) else LocalStore(Path(text))
