"""``paces.json``: how long each rank needs for a step by itself, and which of them stay slower than the others.

A rank's own time is that of a step without what it waits for other ranks (:mod:`pipeline.engine.pace`). Windows of a
quarter of ``engine.slow_minutes`` are judged; the file is replaced with each of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.files import replace_file
from pipeline.record.formats import short

FILE = "paces.json"
PHASES: tuple[str, ...] = ("data", "step", "checkpoint", "other")
"""Waiting for a batch; forward, backward and update; saving; logging, surveys and whatever else is done between."""
JUDGED = 2
"""So many of them are what a rank is judged by: only rank 0 logs, and ranks do not save alike."""
WINDOWS = 3
"""In a row, that say the same of a rank before it is believed."""
FELT = 0.05
"""Part of a step's duration that a rank must cost the others."""


@dataclass(frozen=True)
class Window:
    """What was measured in a stretch of time."""

    step: int
    """The last of it."""
    seconds: float
    """Of a step, with all that was done between steps."""
    own: Sequence[Sequence[float]]
    """[W,P]: each rank's own seconds a step, by phase."""


@dataclass(frozen=True)
class Slow:
    """A rank that stays slower than the others."""

    rank: int
    node: str
    percent: float
    """How much longer it takes than the median of the others, when it was named."""
    phase: str
    """In which it loses most."""
    step: int
    """At which it was named."""


@dataclass(frozen=True)
class Paces:
    """What the file holds."""

    attempt: int
    step: int
    seconds: float
    nodes: Sequence[str]
    """Of each rank."""
    own: Sequence[Sequence[float]]
    slow: Sequence[Slow] = ()

    def write(self, folder: Path) -> None:
        """Replace the file."""
        rounded = asdict(self) | {"own": [[float(f"{value:.4g}") for value in row] for row in self.own]}
        replace_file(folder / FILE, json.dumps(rounded).encode() + b"\n")


def read_paces(folder: Path, attempt: int | None = None) -> Paces | None:
    """What a run has written last, in an attempt where one is named; None: nothing, or it cannot be read."""
    try:
        values: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
        values["slow"] = [Slow(**slow) for slow in values["slow"]]
        found = Paces(**values)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found if attempt in (None, found.attempt) else None


def others_median(values: Sequence[float]) -> list[float]:
    """For each value the median of all others; of two or more."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranked = [values[i] for i in order]
    found = [0.0] * len(values)
    low, high = (len(values) - 2) // 2, (len(values) - 1) // 2  # the middle of those that are left
    for place, i in enumerate(order):
        found[i] = (ranked[low + (place <= low)] + ranked[high + (place <= high)]) / 2
    return found


@dataclass
class Stragglers:
    """Says which ranks stay slow.

    A rank is slow in a window when its own time in data and step exceeds the median of the other ranks' by
    ``percent``, and that costs each step :data:`FELT` of its duration. After :data:`WINDOWS` such windows in a row it
    is named; after as many without, no more.
    """

    nodes: Sequence[str]
    """Of each rank."""
    percent: float
    named: dict[int, Slow] = field(default_factory=dict[int, Slow])
    _in_a_row: dict[int, int] = field(default_factory=dict[int, int])
    """Windows that say of a rank what is not yet believed."""

    def hear(self, window: Window) -> list[str]:
        """Take in a window. Returns what there is to say."""
        if len(self.nodes) < 2:
            return []
        totals = [sum(row[:JUDGED]) for row in window.own]
        usual = others_median(totals)
        between = max(sum(row[JUDGED:]) for row in window.own)  # an evaluation may take longer than all steps
        felt = FELT * max(window.seconds - between, max(totals))
        news, better = list[int](), list[int]()
        for rank, (own, others) in enumerate(zip(totals, usual, strict=True)):
            excess = own - others
            slow = excess > self.percent / 100 * others and excess > felt
            self._in_a_row[rank] = self._in_a_row.get(rank, 0) + 1 if slow != (rank in self.named) else 0
            if self._in_a_row[rank] == WINDOWS:
                self._in_a_row[rank] = 0
                (news if slow else better).append(rank)
        phases = [others_median([row[p] for row in window.own]) for p in range(JUDGED)]
        for rank in news:
            lost = [window.own[rank][p] - phases[p][rank] for p in range(JUDGED)]
            more = 100 * (totals[rank] / usual[rank] - 1) if usual[rank] > 0 else float("inf")
            phase = PHASES[lost.index(max(lost))]
            self.named[rank] = Slow(rank, self.nodes[rank], min(more, 1e6), phase, window.step)
        for rank in better:
            del self.named[rank]
        return [
            *self._said(news, [(totals[rank], usual[rank]) for rank in news]),
            *(f"rank {rank} on {self.nodes[rank]} is no longer slower than the others" for rank in better),
        ]

    def _said(self, ranks: Sequence[int], times: Sequence[tuple[float, float]]) -> list[str]:
        """Those that are named now; a whole node in one line."""
        said: list[str] = []
        for node in dict.fromkeys(self.nodes[rank] for rank in ranks):
            here = [(rank, time) for rank, time in zip(ranks, times, strict=True) if self.nodes[rank] == node]
            whole = 1 < len(here) == self.nodes.count(node) < len(self.nodes)
            for rank, (own, others) in here[:1] if whole else here:
                slow = self.named[rank]
                who = f"all {len(here)} ranks of node {node} stay" if whole else f"rank {rank} on {node} stays"
                each = f", rank {rank}" if whole else ""
                said.append(
                    f"slow: {who} behind ({slow.percent:.0f} % more than the median of the others{each}), mostly in "
                    f'"{slow.phase}": {short(own)} s a step of its own, where they take {short(others)} s'
                )
        return said


def slow_nodes(folder: Path, attempt: int | None) -> dict[str, str]:
    """Nodes of ranks that were slow when the attempt's last window ended, the slowest first, and how slow."""
    paces = read_paces(folder, attempt)
    if paces is None or attempt is None:
        return {}
    found: dict[str, str] = {}
    for slow in sorted(paces.slow, key=lambda slow: -slow.percent):
        found.setdefault(slow.node, f'rank {slow.rank} is {slow.percent:.0f} % slower, mostly in "{slow.phase}"')
    return found


def rows_of(paces: Paces, most: int) -> list[list[str]]:
    """A table by rank: its head, the slowest ranks first, and where not all have room, the one in the middle of all.

    Args:
        paces: of a run.
        most: rows of ranks.
    """
    order = sorted(range(len(paces.own)), key=lambda rank: -sum(paces.own[rank][:JUDGED]))
    named = {slow.rank: f'slow in "{slow.phase}", +{slow.percent:.0f} %' for slow in paces.slow}
    shown = [(rank, str(rank), named.get(rank, "")) for rank in order[:most]]
    if len(order) > most:
        shown.append((order[len(order) // 2], str(order[len(order) // 2]), f"in the middle of {len(order)}"))
    rows = [
        [name, paces.nodes[rank], *(short(value, 3) for value in paces.own[rank]), remark]
        for rank, name, remark in shown
    ]
    return [["rank", "node", *PHASES, ""], *rows]


def title_of(paces: Paces) -> str:
    """What the table shows."""
    return f"each rank's own seconds a step, without what it waited for others, up to step {paces.step:,}"


def as_text(paces: Paces, most: int) -> list[str]:
    """The table, for a terminal; see :func:`rows_of`."""
    rows = rows_of(paces, most)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [title_of(paces), *(f"  {line}" for line in lines)]
