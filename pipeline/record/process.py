"""Processes of this machine, told apart from others that have had, or will have, the same number."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def boot() -> str:
    """Tells machines apart, and a machine from itself before it was started anew."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def born(pid: int) -> str | None:
    """When a process of this machine was started; None when there is none, or only its exit code is left of it."""
    try:
        facts = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if facts[0] in "ZX" else facts[19]
