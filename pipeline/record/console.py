"""What is said to the person or program that listens at standard output."""

from __future__ import annotations

import os
import sys


def say(text: str) -> None:
    """Print. Who listens may leave after the first line (``| head -1``); the work goes on without being heard."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        nobody = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nobody, sys.stdout.fileno())
        os.close(nobody)
