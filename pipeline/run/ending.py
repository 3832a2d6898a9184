"""What an exception means: an exit code, and a text for the run's state."""

from __future__ import annotations

import errno
from pathlib import Path

from pipeline.config.exitcodes import CONFIG, CRASH
from pipeline.core.errors import SluiceError
from pipeline.core.files import room

_FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def ending(error: BaseException, rank: int) -> tuple[int, str]:
    """Exit code and text. A full disk, or a folder of somebody else's, is to be mended, whatever met it first."""
    if isinstance(error, SluiceError):
        return error.exit_code, str(error)
    if isinstance(error, OSError) and error.errno in (*_FULL, *_CLOSED):
        where = f" ({error.filename})" if error.filename else ""
        if error.errno in _CLOSED:
            return CONFIG, f"{error.strerror}{where}; it is not yours to use so: name another folder, or mend its mode"
        folder = Path(error.filename or "/none").parent
        left = f": {room(folder)}" if folder.is_dir() and error.filename else ""
        return CONFIG, f"{error.strerror}{where}{left}; make room and start again to resume"
    return CRASH, f"rank {rank}: {type(error).__name__}: {error}"
