"""Where a run came from, written into its folder before the first step: ``config.toml`` and ``provenance.json``.

A run that is started again keeps what was written before under "earlier". Changes that were not committed lie beside
it as ``code-DIGEST.diff``.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pipeline
from pipeline.core.files import replace_file

if TYPE_CHECKING:
    from pipeline.config.resolve import Plan
    from pipeline.config.schema import RunConfig

CONFIG_FILE = "config.toml"
FILE = "provenance.json"
PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "accelerate", "webdataset", "numpy", "Pillow", "pydantic")


def write(folder: str | os.PathLike[str], config: RunConfig, plan: Plan) -> None:
    """Write the resolved configuration and where this start of the run comes from. On rank 0 only.

    Args:
        folder: the run's folder, which exists.
        config: the run, every default filled in.
        plan: the run in numbers.
    """
    from pipeline.config.load import dump  # not above: `sluice status` reads, and need not wait for it

    folder = Path(folder)
    commit, diff = code_state(Path(pipeline.__file__).parent)
    changes = f"code-{hashlib.sha256(diff).hexdigest()[:12]}.diff" if diff else None
    if changes:
        replace_file(folder / changes, diff)
    before = read(folder)
    facts = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "folder": os.getcwd(),
        "host": platform.node(),
        "system": platform.platform(),
        "world_size": plan.world_size,
        "plan": asdict(plan),
        "python": platform.python_version(),
        "versions": versions(),
        "git": {"commit": commit, "dirty": bool(diff), "diff": changes},
        "earlier": [*before.pop("earlier"), before] if before else [],
    }
    replace_file(folder / CONFIG_FILE, dump(config).encode())
    replace_file(folder / FILE, json.dumps(facts, indent=1).encode() + b"\n")


def read(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What was written last; empty if nothing was."""
    path = Path(folder) / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


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
    found: dict[str, str | None] = {"sluice": pipeline.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found
