"""``report.html``: all that a run has to show, in one page that needs nothing else, neither files nor network."""

from __future__ import annotations

import math
import os
import shlex
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pipeline.config import provenance
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.files import replace_file
from pipeline.record.board import board
from pipeline.record.curves import Curves, chart, curves
from pipeline.record.exhibits import exhibits
from pipeline.record.files import read_lines
from pipeline.record.formats import duration, short
from pipeline.record.metrics import FILE as METRICS
from pipeline.record.metrics import History, read_history
from pipeline.record.notes import FILE as NOTES
from pipeline.record.paces import read_paces, rows_of, title_of
from pipeline.record.page import NO_CURVES, facts, folded, page, tiles
from pipeline.record.pictures import Shown, encode, shot
from pipeline.record.records import FOLDER as RESULTS
from pipeline.record.results import EARLIER, located, read_results
from pipeline.record.scoreboard import scoreboard
from pipeline.record.showcase import read_pictures
from pipeline.record.state import State, read_state

FILE = "report.html"
PICTURE_BYTES = 1_200_000
"""Most bytes of pictures in a page, before base64; steps are left out, evenly, until they fit."""
_PICTURE_STEPS = 8
_RANKS = 64
_STATES = {"finished": "finished", "running": "running", "failed": "failed", "requeue": "stopped, to be resumed"}
_PLACED = {"samples", "epoch", "attempt", "step", "data_digest", "step_seconds"}
"""Quantities of a metrics line that have no curve of their own."""
_KNOWN: dict[str, tuple[str, dict[str, bool]]] = {
    "lr": ("Learning rate", {"from_zero": True}),
    "grad_norm": ("Gradient norm", {}),
    "samples_per_second": ("Samples per second", {"from_zero": True}),
    "data_wait": ("Time waiting for data", {"percent": True, "from_zero": True}),
    "memory_gb": ("Memory, GB", {"from_zero": True}),
}


def write_report(run_folder: str | os.PathLike[str], out: Path | None = None) -> Path:
    """Write the page of a run, finished or not, and return its path: ``out``, or ``report.html`` in its folder.

    What the run has not got yet (results, pictures, more than one line of metrics) is left out of the page.

    Raises:
        ConfigError: not a run's folder.
        DataError: a file in it is damaged.
    """
    folder = Path(run_folder)
    is_run = any((folder / name).exists() for name in (METRICS, provenance.CONFIG_FILE))
    if not is_run and not any((folder / name).exists() for name in (RESULTS, EARLIER)):
        raise ConfigError(
            f"{folder} is not a run's folder: it has no {METRICS}, {RESULTS}/ or {provenance.CONFIG_FILE}"
        )
    path = folder / FILE if out is None else out
    html = _page(folder.resolve()) if is_run else board([str(folder)])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, html.encode())
    except OSError as error:
        raise ConfigError(f"cannot write {path} ({error.strerror}); name another by --out") from error
    return path


def _page(folder: Path) -> str:
    history = read_history(folder)
    state, starts = read_state(folder), _starts(folder)
    data = curves(history.rows) if history.rows else None
    results = located(read_results(folder), folder)
    body = [
        _header(folder.name, state, starts),
        _tiles(history.rows, state, starts),
        scoreboard(results),
        exhibits(results),
        _curves(data, history) if data else "<h2>Curves</h2><p class=soft>No metrics were logged yet.</p>",
        _showcase(read_pictures(folder)),
        _ranks(folder),
        _origin(folder, starts),
    ]
    embedded = {"x": data.x, "step": data.step, "series": _rounded(data)} if data else NO_CURVES
    return page(folder.name, "".join(body), embedded)


def _rounded(data: Curves) -> dict[str, list[float | None]]:
    return {
        name: [None if v is None else float(f"{v:.5g}") for v in series.mean]
        for name, series in data.series.items()
        if name not in _PLACED
    }


def _starts(folder: Path) -> list[dict[str, Any]]:
    """The provenance of each start of the run, oldest first.

    Raises:
        DataError: the file is damaged.
    """
    last, path = provenance.read(folder), folder / provenance.FILE
    if not last and path.exists():
        raise DataError(f"{path} is damaged; remove it to write the report without it")
    return [*last.pop("earlier", []), last] if last else []


def _header(name: str, state: State | None, starts: Sequence[Mapping[str, Any]]) -> str:
    first, last = (starts[0], starts[-1]) if starts else ({}, {})
    world, git = last.get("world_size"), last.get("git", {})
    commit = f"git <code>{escape(git['commit'][:10])}</code>" if git.get("commit") else ""
    about = (
        f"started {escape(_moment(first['time']))}" if "time" in first else "",
        escape(str(last.get("host", ""))),
        f"{world} process{'es' if world > 1 else ''}" if world else "",
        commit + (" with uncommitted changes" if git.get("dirty") else ""),
        f"as of {escape(_moment(state.time))}" if state and state.outcome == "running" else "",
    )
    chip = f'<span class="state {state.outcome}">{_STATES[state.outcome]}</span>' if state else ""
    return (
        f'<header><p class="brand">Sluice run</p><div class="title"><h1>{escape(name)}</h1>{chip}</div>'
        f'<p class="about">{"".join(f"<span>{a}</span>" for a in about if a)}</p>'
        + (f'<pre class="command">$ {escape(shlex.join(last["command"]))}</pre>' if "command" in last else "")
        + (f'<pre class="error">{escape(state.error)}</pre>' if state and state.error else "")
        + "</header>"
    )


def _moment(iso: str) -> str:
    """An ISO 8601 time without its punctuation."""
    return iso.replace("T", " ").replace("+00:00", " UTC")


def _tiles(rows: Sequence[dict[str, Any]], state: State | None, starts: Sequence[Mapping[str, Any]]) -> str:
    """The run in a few numbers; one that the metrics do not give has no tile."""
    last = rows[-1] if rows else {}
    step = max(state.step if state else 0, last.get("step", 0))
    total = starts[-1].get("plan", {}).get("total_steps") if starts else None
    speeds = [row["samples_per_second"] for row in rows if "samples_per_second" in row]
    waits = [row["data_wait"] for row in rows if "data_wait" in row]
    seconds = _training_seconds(rows)
    attempt = max(state.attempt if state else 0, *(row.get("attempt", 0) for row in rows), 0)
    shown = {
        "Steps": f"{step:,}" + (f" / {total:,}" if total and total != step else ""),
        "Samples": short(last["samples"]) if "samples" in last else None,
        "Epochs": f"{last['epoch']:.4g}" if "epoch" in last else None,
        "Loss": short(last["loss"]) if "loss" in last else None,
        "Samples/s": short(statistics.median(speeds), 3) if speeds else None,
        "Data wait": f"{statistics.fmean(waits):.1%}" if waits else None,
        "Training time": duration(seconds) if seconds else None,
        "Restarts": str(attempt) if attempt else None,
    }
    return tiles(shown)


def _training_seconds(rows: Sequence[dict[str, Any]]) -> float:
    """Time spent in the steps that count: each line's seconds per step, times the steps since the line before."""
    before, total = 0, 0.0
    for row in rows:
        total += row.get("step_seconds", math.nan) * (row["step"] - before)
        before = row["step"]
    return total if math.isfinite(total) else 0.0


def _curves(data: Curves, history: History) -> str:
    """Loss, the objective's metrics (those with a common prefix together), then the optimizer's and the speed."""
    own: dict[str, list[str]] = {}
    for name in data.series:
        if name not in _PLACED and name not in _KNOWN and name != "loss":
            own.setdefault(name.partition("/")[0], []).append(name)
    figures = [chart("Loss", ["loss"], data)] if "loss" in data.series else []
    for prefix, names in own.items():
        for start in range(0, len(names), 6):  # as many as there are colours
            figures.append(chart(prefix if len(names) > 1 else names[0], names[start : start + 6], data))
    figures += [chart(title, [name], data, **how) for name, (title, how) in _KNOWN.items() if name in data.series]
    keys = []
    if data.restarts:
        keys.append("<i></i>restart.")
    broken = _not_finite(history.rows)
    if broken:
        keys.append(f"<b>&times;</b> not finite: {escape('; '.join(broken))}.")
    if history.torn:
        keys.append(f"{history.torn} torn line(s) of the metrics were skipped.")
    return (
        f'<h2>Curves <small>against {data.unit}</small></h2><div class="charts linked">{"".join(figures)}</div>'
        f'<p class="keys">{" &nbsp; ".join(keys)}</p>'
    )


def _not_finite(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Where values are not finite, in words: the first three, and how many more."""
    found = [
        f"{name} is {value} at step {row['step']:,}"
        for row in rows
        for name, value in row.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    return found[:3] + ([f"and {len(found) - 3} more"] if len(found) > 3 else [])


def _showcase(pictures: dict[int, list[Shown]]) -> str:
    """A row per step, from the first to the last: as many steps, evenly spread, as fit into the page."""
    if not pictures:
        return ""
    chosen = _spread(list(pictures), _PICTURE_STEPS)
    encoded = {step: [encode(shown) for shown in pictures[step]] for step in chosen}
    while len(chosen) > 1 and sum(len(shot.data) for step in chosen for shot in encoded[step]) > PICTURE_BYTES:
        chosen = _spread(chosen, len(chosen) - 1)
    sections = [
        f'<section><h3>Step {step:,}</h3><div class="shots">{"".join(map(shot, encoded[step]))}</div></section>'
        for step in chosen
    ]
    more = f" <small>{len(chosen)} of {len(pictures)} steps</small>" if len(chosen) < len(pictures) else ""
    return f'<h2>Showcase{more}</h2><div class="steps">{"".join(sections)}</div>'


def _spread(steps: list[int], count: int) -> list[int]:
    """At most ``count`` of the steps, evenly, the last one always, the first one if there is room for two."""
    if count >= len(steps):
        return steps
    return [steps[-1 - i * (len(steps) - 1) // max(count - 1, 1)] for i in range(count)][::-1]


def _ranks(folder: Path) -> str:
    """A table of what each rank takes by itself; nothing of a run on one."""
    paces = read_paces(folder)
    if paces is None or len(paces.nodes) < 2:
        return ""
    head, *rows = rows_of(paces, _RANKS)
    cells = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    names = "".join(f"<th>{name}</th>" for name in head)
    table = f"<table><thead><tr>{names}</tr></thead><tbody>{cells}</tbody></table>"
    slow = "; ".join(f'rank {slow.rank} on {slow.node} was slow in "{slow.phase}"' for slow in paces.slow)
    body = f'<p class="soft">{escape(title_of(paces).capitalize())}.</p><div class="scroll">{table}</div>'
    return f"<h2>Ranks</h2><p>{escape(slow)}</p>{folded('Own time by rank', body)}"


def _origin(folder: Path, starts: Sequence[Mapping[str, Any]]) -> str:
    """Notes of the run, the resolved configuration and the provenance, folded."""
    parts = []
    notes, _ = read_lines(folder / NOTES)
    if notes:
        parts.append(folded("Notes", facts([(_moment(note["time"]), note["text"]) for note in notes])))
    config = folder / provenance.CONFIG_FILE
    if config.exists():
        parts.append(folded("Configuration", f"<pre>{escape(config.read_text(encoding='utf-8'))}</pre>"))
    if changes := [change for start in starts[-1:] for change in start.get("changes", [])]:
        pairs = [
            (f"after step {change['step']:,}", f"{key}: {was['before']}, now {was['now']}")
            for change in changes
            for key, was in change["settings"].items()
        ]
        parts.append(folded("Settings that became others", facts(pairs)))
    starts = [{k: v for k, v in start.items() if k != "changes"} for start in starts]
    before: dict[str, str] = {}
    for number, start in enumerate(starts, start=1):
        flat = dict(_flat(start))
        changed = [(k, v) for k, v in flat.items() if before.get(k) != v]
        title = f"Start {number}: what was different" if before else "Provenance"
        parts.append(folded(title, facts(changed)))
        before = flat
    return "<h2>Origin</h2>" + "".join(parts) if parts else ""


def _flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Nested values as (dotted path, text)."""
    if isinstance(value, Mapping):
        return [pair for k, v in value.items() for pair in _flat(v, f"{path}.{k}" if path else str(k))]
    if isinstance(value, list):
        return [(path, shlex.join(map(str, value)))]
    return [(path, str(value))]
