"""The fault matrix: what was done to a run, how it ended, and the seconds until it trained again.

A test of a row is marked ``@pytest.mark.fault(NUMBER, "what is done")``, takes the fixture ``fault_row`` and tells it
what happened. ``pytest -m fault --faults FILE`` appends a line per test to FILE, also for those that fail or skip, and
``python -m tests.faults.matrix FILE`` prints them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Row:
    """One fault, once."""

    row: int
    """Number in the matrix."""
    fault: str
    case: str = ""
    """Which of several, and where: "ZeRO 2, half a file"."""
    outcome: str = ""
    """How it ended: "same batches from step 3 on", "exit 2, names the disk"."""
    seconds: float | None = None
    """From the fault to the next training step, or to the end of the last process where the run must stop."""
    until: str = "training"
    """What ``seconds`` count to: "training" or "stopped"."""
    result: str = "not run"
    """"passed", "failed" or "skipped"."""
    test: str = ""


def mark_of(item: pytest.Item) -> Row | None:
    """The row that a test belongs to."""
    mark = item.get_closest_marker("fault")
    return None if mark is None else Row(*mark.args, test=item.nodeid)


def append(path: Path, row: Row) -> None:
    """Add a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def outcome(report: Any) -> tuple[str, str]:
    """Result of a test's call or set-up, and the reason where it was skipped."""
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        return "skipped", reason.removeprefix("Skipped: ")
    return ("passed" if report.passed else "failed"), ""


def read(path: Path) -> list[Row]:
    """All lines, by row; a test that ran again counts once, the last time."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = Row(**json.loads(line))
        rows[row.test] = row
    return sorted(rows.values(), key=lambda r: (r.row, r.fault))


def table(rows: Sequence[Row]) -> str:
    """As Markdown."""
    lines = ["| # | fault | case | outcome | seconds | |", "|--:|---|---|---|--:|---|"]
    for r in rows:
        seconds = "" if r.seconds is None else f"{r.seconds:.1f}" + (" (to the end)" if r.until == "stopped" else "")
        lines.append(f"| {r.row} | {r.fault} | {r.case} | {r.outcome} | {seconds} | {r.result} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Print the matrix; 1 if a row failed."""
    rows = read(Path(arguments[0]))
    print(table(rows))
    failed = sum(r.result == "failed" for r in rows)
    skipped = sum(r.result == "skipped" for r in rows)
    print(f"\n{len(rows)} faults: {len(rows) - failed - skipped} survived, {failed} failed, {skipped} skipped")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
