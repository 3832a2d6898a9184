"""What all records of figures say of themselves: see :mod:`tests.figures` and :mod:`tests.tables`."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
ORIGIN = {"command": str, "commit": str, "date": date, "hardware": str, "seeds": int}
"""What every record says of where its figures come from."""


class RecordError(ValueError):
    """A record, or a text that asks for one, is not as it must be."""


def commit_now() -> str:
    """The commit that is checked out, in short."""
    asked = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def hardware() -> str:
    """This machine, in words."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} cores of {model or platform.machine()}, load {load:.1f} at the start"
