"""What an exception means: an exit code, and a text for the run's state."""

from __future__ import annotations

import errno

from pipeline.config.exitcodes import CONFIG, CRASH
from pipeline.core.errors import SluiceError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def ending(error: BaseException, rank: int) -> tuple[int, str]:
    """Exit code and text. A full disk is for the user to mend, whatever met it first."""
    if isinstance(error, SluiceError):
        return error.exit_code, str(error)
    if isinstance(error, OSError) and error.errno in _FULL:
        where = f" ({error.filename})" if error.filename else ""
        return CONFIG, f"{error.strerror}{where}; make room and start again to resume"
    return CRASH, f"rank {rank}: {type(error).__name__}: {error}"
