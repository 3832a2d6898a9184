"""What has become of the runs of a sweep, read from their folders, and the table of it."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from launch import history, runs, status
from pipeline.config import load, provenance
from pipeline.config.changes import changes, refuse
from pipeline.config.exitcodes import CONFIG, CRASH, FINISHED, NONFINITE, REQUEUE
from pipeline.config.sweep import Plan, Variant
from pipeline.core.errors import ConfigError
from pipeline.core.files import replace_file
from pipeline.record import logs
from pipeline.record.runs import gather_seeds
from pipeline.record.state import read_state

FILE = "sweep.json"
FOR_GOOD = (CONFIG, NONFINITE)
"""Exit codes after which starting again would fail again."""
Standing = Literal["new", "begun", "finished", "failed"]


@dataclass(frozen=True)
class Ended:
    """``sweep.json``: how a sweep's last look at a run ended."""

    config: str
    """Digest of the configuration."""
    exit_code: int
    error: str = ""
    suite: str = ""
    """Digest of the suite that was evaluated after it; empty: none was."""
    suite_code: int = FINISHED
    suite_error: str = ""


def folder_of(variant: Variant) -> Path:
    """Of a run."""
    return Path(variant.config.run.folder)


def read_ended(folder: Path) -> Ended | None:
    """How a run ended when a sweep saw it last; None: none has, or what it wrote cannot be read."""
    try:
        return Ended(**json.loads((folder / history.FOLDER / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def standing(variant: Variant) -> Standing:
    """What has become of a run so far, by its own word."""
    folder = folder_of(variant)
    digest, state, ended = provenance.digest(variant.config), read_state(folder), read_ended(folder)
    if state is not None and state.outcome == "finished":
        return "finished"
    by_itself = state is not None and state.outcome == "failed" and state.exit_code in FOR_GOOD
    if by_itself and state is not None and state.config == digest:
        return "failed"
    if ended is not None and ended.exit_code in FOR_GOOD and ended.config == digest and not _since(folder):
        return "failed"
    return "begun" if state is not None else "new"


def _since(folder: Path) -> bool:
    """Whether the run has been started, by whomever, after a sweep saw its end."""
    state, ended = folder / "state.json", folder / history.FOLDER / FILE
    return state.exists() and state.stat().st_mtime_ns > ended.stat().st_mtime_ns


def reason(folder: Path, code: int) -> str:
    """Why a run has failed, in its own words where it has any."""
    state = read_state(folder)
    if state is not None and state.outcome == "failed" and state.error:
        return state.error
    said = logs.last_error(folder, 0)
    return said.removeprefix("sluice: ") if said else f"ended with exit code {code}, without a word"


def write_ended(folder: Path, ended: Ended) -> None:
    """Keep how a run ended, at once."""
    replace_file(folder / history.FOLDER / FILE, json.dumps(asdict(ended), indent=1).encode() + b"\n")


def same_run(variant: Variant, title: str) -> None:
    """Be sure that what lies in a run's folder is that run.

    Raises:
        ConfigError: it is another, or was trained to its end as another.
    """
    folder = folder_of(variant)
    try:
        before = tomllib.loads((folder / provenance.CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / provenance.CONFIG_FILE} cannot be read: {error}") from error
    found = changes(before, tomllib.loads(load.dump(variant.config)))
    if standing(variant) == "finished":
        found = [replace(c, rule="experiment" if c.rule == "course" else c.rule) for c in found]
        if others := [str(c) for c in found if c.rule != "how"]:
            raise ConfigError(
                f"{folder} has finished as another run: {'; '.join(others)}; set run.folder for a new sweep"
            )
    refuse(found, variant.config.run.change, title, str(folder))


def failures(plan: Plan) -> list[tuple[str, int, str]]:
    """Name, exit code and reason of all runs that have failed or could not be evaluated."""
    found: list[tuple[str, int, str]] = []
    for variant in plan.variants:
        folder = folder_of(variant)
        ended, state = read_ended(folder), read_state(folder)
        if standing(variant) == "finished":
            if ended is not None and ended.suite_code != FINISHED:
                found.append((variant.name, ended.suite_code, f"evaluation: {ended.suite_error}"))
        elif ended is not None and ended.exit_code not in (FINISHED, REQUEUE):
            found.append((variant.name, ended.exit_code, ended.error))
        elif state is not None and state.outcome == "failed":
            found.append((variant.name, state.exit_code or CRASH, state.error or ""))
    return found


def outcome_table(plan: Plan) -> str:
    """All runs, the means over seeds where there are several, and what has failed and why.

    Nothing in it depends on when or how often the sweep was given.
    """
    known = [variant for variant in plan.variants if status.is_run(folder_of(variant))]
    found = runs.listed([folder_of(variant) for variant in known], settings=True)
    named = [
        replace(one, facts={**one.facts, "run": variant.name, "error": "", "note": "", "tags": []})
        for one, variant in zip(found, known, strict=True)
    ]
    columns = ["loss", *runs.results_of(named)[: runs.RESULTS]]
    parts = [runs.table(named, columns)] if named else []
    gathered = gather_seeds(named)
    if len(gathered) < len(named):
        parts.append(runs.table(gathered, columns))
    waiting = [variant.name for variant in plan.variants if variant not in known]
    parts += [f"not begun: {', '.join(waiting)}"] if waiting else []
    if failed := failures(plan):
        width = max(len(name) for name, _, _ in failed)
        lines = [f"  {name:<{width}}  exit code {code}: {' '.join(why.split())}" for name, code, why in failed]
        parts.append("\n".join([f"failed: {len(failed)} of {len(plan.variants)}", *lines]))
    return "\n\n".join(parts)
