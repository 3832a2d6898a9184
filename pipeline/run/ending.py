"""What an exception means: an exit code, and a text for the run's state."""

from __future__ import annotations

import errno

from pipeline.config.exitcodes import CONFIG
from pipeline.core.errors import SluiceError

CRASH = 1
"""Exit code of what only a bug, the machine or another rank can cause: worth another try."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


def ending(error: BaseException, rank: int) -> tuple[int, str]:
    """Exit code and text. A full disk is for the user to mend, whatever met it first."""
    if isinstance(error, SluiceError):
        return error.exit_code, str(error)
    if isinstance(error, OSError) and error.errno in _FULL:
        where = f" ({error.filename})" if error.filename else ""
        return CONFIG, f"rank {rank}: {error.strerror}{where}; make room and start again to resume"
    return CRASH, f"rank {rank}: {type(error).__name__}: {error}"
