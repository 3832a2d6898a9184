"""``sluice runs``: many runs in one table, chosen by conditions and put in order; and what people say of a run."""

from __future__ import annotations

import getpass
import glob
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from launch import history, status
from pipeline.core.errors import ConfigError, LaunchError
from pipeline.core.files import replace_file
from pipeline.record import notes, runs
from pipeline.record.formats import decimals, short, with_error
from pipeline.record.runs import Listed

RESULTS = 3
"""Results that have a column of their own without being asked for: those that most runs have."""
NOTE_WIDTH = 60
"""Letters of a note or an error in a table."""
_NUMBERS = ("loss", "samples_per_second")
_TITLES = {"samples_per_second": "images/s", "total_steps": "steps"}


class Wanted(NamedTuple):
    """What is asked for on the command line."""

    where: str = ""
    """A condition; empty: all."""
    sort: str = ""
    """A name, "-" before it for the other way; empty: by folder."""
    show: Sequence[str] = ()
    """Further columns."""
    seeds: bool = False
    """Gather those that only their seeds tell apart."""


def find(patterns: Sequence[str]) -> list[Path]:
    """The run folders that patterns name, and those below the other folders that they name; of none, below runs/.

    Raises:
        LaunchError: a pattern names nothing.
    """
    found: dict[Path, None] = {}
    for pattern in patterns or [str(status.ROOT)]:
        # A folder may be called "lr=[1]": what is there is itself.
        paths = [Path(pattern)] if Path(pattern).exists() else [Path(p) for p in sorted(glob.glob(pattern))]
        below = [run for path in paths for run in status.find_runs(path)]
        if not below and patterns:
            raise LaunchError(f"{pattern} names no run folder, and no folder with runs in it")
        found |= dict.fromkeys(below)
    return list(found)


def listed(folders: Sequence[Path], *, settings: bool) -> list[Listed]:
    """All that is known of each run.

    Args:
        folders: of the runs.
        settings: read the configurations too.
    """
    found = [runs.read_run(folder, settings=settings) for folder in folders]
    # What has finished and was never submitted is not going to be anything else.
    open_ones = [
        run.folder
        for run in found
        if run.facts["state"] not in ("finished", "unreadable") or (run.folder / history.FOLDER / history.FILE).exists()
    ]
    phases = status.phases(open_ones) if open_ones else {}
    return [_in_phase(run, *phases[run.folder]) if run.folder in phases else run for run in found]


def _in_phase(run: Listed, phase: str, detail: str) -> Listed:
    known = run.facts["error"] if phase in ("failed", "died") else ""
    return replace(run, facts={**run.facts, "state": phase, "error": known or (detail if phase != "running" else "")})


def choose(folders: Sequence[Path], wanted: Wanted, *, settings: bool = False) -> list[Listed]:
    """The runs that are asked for, in the order that is.

    Raises:
        ConfigError: the condition or a name in it, or in the order or the columns, is none.
    """
    where = runs.condition(wanted.where) if wanted.where else None
    names = [*(where.columns if where else ()), wanted.sort.removeprefix("-"), *wanted.show]
    found = listed(folders, settings=settings or wanted.seeds or any("." in name for name in names))
    runs.check_names(wanted.show, found)
    if where is not None:
        found = runs.chosen(found, where)
    if wanted.seeds:
        found = runs.gather_seeds(found)
    return runs.ordered(found, wanted.sort) if wanted.sort and found else found


def results_of(found: Sequence[Listed]) -> list[str]:
    """Names of results of evaluations, those that most runs have first."""
    counts = Counter(name for run in found for name in run.better)
    return sorted(counts, key=lambda name: -counts[name])


def table(found: Sequence[Listed], columns: Sequence[str]) -> str:
    """A line for each run; what stands in no column is left out."""
    told = any(run.facts["note"] or run.facts["error"] for run in found)
    tagged = any(run.facts["tags"] for run in found)
    heads = ["run", "state", "step", *columns, *(["tags"] if tagged else []), *([""] if told else [])]
    lines = [[_TITLES.get(head, head) for head in heads]]
    for run in found:
        cells = [str(run.facts["run"]), run.facts["state"], _step(run), *(cell(run, name) for name in columns)]
        cells += [", ".join(run.facts["tags"])] if tagged else []
        lines.append([*cells, *([_cut(run.facts["error"] or run.facts["note"])] if told else [])])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _step(run: Listed) -> str:
    step, total = run.facts["step"], run.facts["total_steps"]
    return f"{step:,}" + (f"/{total:,}" if total and total != step else "") if step or total else "-"


def cell(run: Listed, name: str) -> str:
    """A value as a table shows it, with its standard error."""
    value: Any = run.values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None or value == "" else str(value)
    error = run.errors.get(name)
    return short(value) if error is None else with_error(value, error, decimals([value], [error]))


def _cut(text: str | None) -> str:
    line = " ".join((text or "").split())
    return line if len(line) <= NOTE_WIDTH else line[: NOTE_WIDTH - 3] + "..."


def text_of(patterns: Sequence[str], wanted: Wanted) -> str:
    """What `sluice runs` prints.

    Raises:
        LaunchError: a pattern names no run.
        ConfigError: see :func:`choose`.
    """
    folders = find(patterns)
    if not folders:
        return f"no runs in {status.ROOT}"
    found = choose(folders, wanted)
    asked = [*wanted.show, *([name] if (name := wanted.sort.removeprefix("-")) else [])]
    own = [name for name in asked if name not in runs.OWN]
    columns = dict.fromkeys([*_NUMBERS, *results_of(found)[:RESULTS], *own])
    count = (
        f"{len(found)} of {len(folders)} runs" if not wanted.seeds else f"{len(found)} lines, of {len(folders)} runs"
    )
    return f"{table(found, list(columns))}\n{count}"


def page(patterns: Sequence[str], wanted: Wanted, out: Path) -> str:
    """Write a page of the runs that are asked for. Returns what there is to say.

    Raises:
        LaunchError: a pattern names no run, or the page cannot be written.
        ConfigError: see :func:`choose`.
    """
    from pipeline.record.index import index_page

    if wanted.show:
        raise ConfigError("a page has all columns; leave --show out")
    found = choose(find(patterns), wanted, settings=True)
    try:
        replace_file(out, index_page(found).encode())
    except OSError as error:
        raise LaunchError(f"cannot write {out}: {error.strerror}") from error
    return f"{out}: {len(found)} {'lines' if wanted.seeds else 'runs'}"


def note(run: Path, text: str, tags: Sequence[str], untags: Sequence[str]) -> str:
    """Say something of a run, give or take away tags; with nothing to say, tell what was said.

    Raises:
        LaunchError: it is no run, a tag is no single word, or its folder cannot be written.
    """
    status.check_run(run)
    for tag in (*tags, *untags):
        if not tag or any(letter.isspace() or letter == "," for letter in tag):
            raise LaunchError(f"tag {tag!r}: a tag is one word without commas")
    said = bool(text or tags or untags)
    holds = notes.remark(run, _author(), text, tags, untags) if said else notes.read_remarks(run)
    return "\n".join([f"{run}: tags {', '.join(holds.tags) or 'none'}", *([holds.note] if holds.note else [])])


def _author() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        return f"user {os.getuid()}"
