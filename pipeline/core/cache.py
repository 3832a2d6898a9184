"""What can be made again is kept in one folder: ``SLUICE_CACHE``, or ``~/.cache/sluice``. Nothing heavy is imported.

Each kind of thing has a folder of its own there ("data", "features"), and each entry a folder in that, named by all
that decides its content. An entry appears under its name when it is whole, and is never changed after that.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.errors import ConfigError, DataError
from pipeline.core.files import sync_folder
from pipeline.core.location import reason

VARIABLE = "SLUICE_CACHE"
"""Environment variable that names the folder."""
_LOOK = 0.2
"""Seconds between two looks whether another process is done."""
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


def cache_folder(kind: str) -> Path:
    """The folder of one kind of entries, made if need be.

    Raises:
        ConfigError: it cannot be made.
    """
    folder = Path(os.environ.get(VARIABLE) or "~/.cache/sluice").expanduser() / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        raise ConfigError(f"cannot make the cache folder {folder} ({why}); set {VARIABLE} to another one") from error
    return folder


def entry(
    kind: str,
    mark: str,
    build: Callable[[Path], None],
    is_whole: Callable[[Path], bool],
    waiting: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """The folder of an entry. One process builds it while all others that ask for it wait; who dies is replaced.

    Args:
        kind: of entry.
        mark: hash of all that decides its content.
        build: fills an empty folder.
        is_whole: whether an entry is as it was built; one that is not is built anew.
        waiting: is told once, when another process is building it.

    Raises:
        ConfigError: see :func:`cache_folder`.
        DataError: it cannot be written.
    """
    found = cache_folder(kind) / mark
    if is_whole(found):
        return found
    try:
        with _alone(found.with_name(f".{mark}.lock"), lambda: waiting(found)) as alone:
            if not is_whole(found):
                _replace(found, build, is_whole, alone=alone)
    except OSError as error:
        raise DataError(
            f"cannot write into the cache {found.parent} ({reason(error)}); make room there, or set {VARIABLE} to "
            "another folder"
        ) from error
    return found


def _replace(found: Path, build: Callable[[Path], None], is_whole: Callable[[Path], bool], *, alone: bool) -> None:
    """Build an entry under another name, then give it its own; what is there under it is damaged."""
    for left in found.parent.glob(f".{found.name}.*.part") if alone else ():  # of processes that died
        shutil.rmtree(left, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=f".{found.name}.", suffix=".part", dir=found.parent))
    try:
        build(part)
        shutil.rmtree(found, ignore_errors=True)
        os.rename(part, found)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError) and is_whole(found):  # where there are no locks, another was faster
            return
        raise
    sync_folder(found.parent)


@contextmanager
def _alone(lock: Path, waiting: Callable[[], None]) -> Generator[bool]:
    """Hold a lock that the system takes from whoever dies; False: there are no locks here, so nobody waits."""
    file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        said = False
        while (taken := _taken(file)) is None:
            if not said:
                waiting()
            said = True
            time.sleep(_LOOK)
        yield taken
    finally:
        os.close(file)


def _taken(file: int) -> bool | None:
    """Whether the lock is ours; None: it is another's; False: the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True
