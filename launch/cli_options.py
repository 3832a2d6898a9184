"""Arguments and options that several verbs of ``sluice`` have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path, typer.Argument(help="Configuration file (TOML).")]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        default_factory=list,
        show_default=False,
        help="Override a value: optimizer.lr=1e-3. May be repeated.",
    ),
]
Procs = Annotated[int, typer.Option(min=1, help="Processes (ranks) on this machine.")]


def again(path: Path) -> Path:
    """A configuration that other processes will read as well.

    Raises:
        ConfigError: it is a pipe, from which only the first can read.
    """
    from pipeline.core.errors import ConfigError

    if path.is_fifo():
        raise ConfigError(f"{path} is a pipe, and the ranks have to read it again: write it into a file first")
    return path
