"""Where a run came from, in its folder: ``config.toml`` and ``provenance.json``.

A run that is started again keeps what was written before under "earlier", and under "changes" which settings became
others, and at which step. ``config.toml`` is what is being trained: it is replaced when all is ready for the next step.
Changes of the code that were not committed lie beside it as ``code-DIGEST.diff``.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pipeline
from pipeline.core.files import replace_file

if TYPE_CHECKING:
    from pipeline.config.changes import Change
    from pipeline.config.resolve import Plan
    from pipeline.config.schema import RunConfig

CONFIG_FILE = "config.toml"
FILE = "provenance.json"
COMMAND = "SLUICE_COMMAND"
"""Environment variable: the command that a person gave, and the folder where, in JSON."""
PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "accelerate", "webdataset", "numpy", "Pillow", "pydantic")


def write(folder: str | os.PathLike[str], plan: Plan) -> None:
    """Write where this start of the run comes from. On rank 0 only.

    Args:
        folder: the run's folder, which exists.
        plan: the run in numbers.
    """
    folder = Path(folder)
    commit, diff = code_state(Path(pipeline.__file__).parent)
    changed = f"code-{hashlib.sha256(diff).hexdigest()[:12]}.diff" if diff else None
    if changed:
        replace_file(folder / changed, diff)
    before = read(folder)
    changes = before.pop("changes", [])
    start = {"start": before.pop("start")} if "start" in before else {}
    facts = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **command(),
        "host": platform.node(),
        "system": platform.platform(),
        "world_size": plan.world_size,
        "plan": asdict(plan) | {"schedule": {"name": plan.schedule.name, **plan.schedule.model_dump(mode="json")}},
        "python": platform.python_version(),
        "versions": versions(),
        "git": {"commit": commit, "dirty": bool(diff), "diff": changed},
        **start,
        "changes": changes,
        "earlier": [*before.pop("earlier", []), before] if before else [],
    }
    _save(folder, facts)


def digest(config: RunConfig) -> str:
    """Tells a run's configuration from others; the order in which it is written tells nothing."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def command() -> dict[str, Any]:
    """What was given to start this, and where: the launcher says so in :data:`COMMAND`."""
    try:
        told = json.loads(os.environ[COMMAND])
        return {"command": told["command"], "folder": told["folder"]}
    except (KeyError, ValueError, TypeError):
        return {"command": sys.argv, "folder": os.getcwd()}


def command_variable(words: Sequence[str]) -> dict[str, str]:
    """The variable by which a launcher tells its ranks which command it was given here.

    Args:
        words: of the command, from "sluice" on.
    """
    return {COMMAND: json.dumps({"command": list(words), "folder": os.getcwd()})}


def train_on(folder: str | os.PathLike[str], config: RunConfig, step: int, changes: Sequence[Change]) -> None:
    """Write the resolved configuration, with which the steps after ``step`` are made. On rank 0 only.

    Args:
        folder: the run's folder, which exists.
        config: the run, every default filled in.
        step: updates done.
        changes: since the configuration that made them.
    """
    from pipeline.config.load import dump  # not above: `sluice status` reads, and need not wait for it

    facts = read(folder)
    kept = [entry for entry in facts.get("changes", []) if entry["step"] < step]  # what came after was given up
    new = {c.key: {"before": c.before, "now": c.now} for c in changes}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    _save(Path(folder), facts | {"changes": [*kept, *([{"step": step, "time": now, "settings": new}] if new else [])]})
    replace_file(Path(folder) / CONFIG_FILE, dump(config).encode())


def started(folder: str | os.PathLike[str], report: dict[str, Any]) -> None:
    """Write from which weights the run has started, and what became of each. On rank 0 only."""
    _save(Path(folder), read(folder) | {"start": report})


def _save(folder: Path, facts: dict[str, Any]) -> None:
    replace_file(folder / FILE, json.dumps(facts, indent=1).encode() + b"\n")


def read(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What was written last; empty if nothing was, or nothing that can be read."""
    try:
        facts = json.loads((Path(folder) / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast("dict[str, Any]", facts) if isinstance(facts, dict) else {}


def code_state(source: Path) -> tuple[str | None, bytes]:
    """The commit that ``source`` is checked out from, and what was changed since in tracked files.

    Returns:
        None and nothing for code that was installed rather than checked out, or where there is no git.
    """

    def git(*arguments: str) -> bytes:
        command = ["git", "-C", str(source), *arguments]
        return subprocess.run(command, check=True, capture_output=True).stdout

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # in a checkout, but not of this project: a site-packages
        return git("rev-parse", "HEAD").decode().strip(), git("diff", "HEAD", "--binary")
    except (subprocess.CalledProcessError, FileNotFoundError):
        return None, b""


def versions() -> dict[str, str | None]:
    """Versions of this project and of the packages that decide its numbers; None for one that is not installed."""
    return {"sluice": pipeline.__version__} | {name: _version(name) for name in PACKAGES}


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
