"""Verbs of ``sluice`` about many runs: ``sweep``, ``runs`` and ``note``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def runs(
    patterns: Annotated[
        list[str] | None, typer.Argument(metavar="GLOB...", help="Run folders, or folders of runs; left out: runs/.")
    ] = None,
    where: Annotated[
        str, typer.Option(metavar="CONDITION", help="'optimizer.lr > 1e-4 and state == \"finished\"'.")
    ] = "",
    sort: Annotated[str, typer.Option(metavar="NAME", help="knn/top1: the best first; -NAME: the other way.")] = "",
    show: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A further column: optimizer.lr. May be repeated.")
    ] = None,
    seeds: Annotated[
        bool, typer.Option("--seeds", help="Runs that only their seeds tell apart in one line, mean +- standard error.")
    ] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page instead: sort, filter, plot.")] = None,
) -> None:
    """List runs: state, length, quality, speed, tags and notes; by any setting, metric or result."""
    from launch import runs as module

    wanted = module.Wanted(where, sort, show or (), seeds)
    typer.echo(module.text_of(patterns or [], wanted) if html is None else module.page(patterns or [], wanted, html))


def note(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    text: Annotated[str, typer.Argument(help="What there is to say; left out: show what was said.")] = "",
    tag: Annotated[list[str] | None, typer.Option(metavar="WORD", help="Give it a tag. May be repeated.")] = None,
    untag: Annotated[list[str] | None, typer.Option(metavar="WORD", help="Take a tag away.")] = None,
) -> None:
    """Keep a note on a run, and give it tags; `sluice runs` shows and filters by them."""
    from launch import runs as module

    typer.echo(module.note(run, text, tag or (), untag or ()))


def add(app: typer.Typer) -> None:
    """Add the verbs to the command."""
    app.command("runs")(runs)
    app.command("note")(note)
