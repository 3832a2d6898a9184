"""Exit codes: the interface between a rank, the launcher and the scheduler."""

from typing import Final

FINISHED: Final = 0
"""The run reached its length."""

CRASH: Final = 1
"""What only a bug, the machine or another rank can cause: worth another try."""

INCOMPLETE: Final = 1
"""Of a suite: evaluations have failed, and said why; what the others have measured is kept. Given again, it does what
is not there."""

CONFIG: Final = 2
"""Something the user must mend: configuration, data, checkpoint, launch."""

NONFINITE: Final = 70
"""A loss or gradient was not finite; starting again would fail again."""

REQUEUE: Final = 75
"""Stopped on request after saving; start again to go on (sysexits' EX_TEMPFAIL)."""
