"""Verbs of ``sluice`` about many runs: ``sweep``, ``runs`` and ``note``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def sweep(
    config: Annotated[Path, typer.Argument(help="Configuration with [sweep] (TOML).")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a value of all runs. May be repeated."),
    ] = None,
    procs: Annotated[int, typer.Option(min=1, help="Processes (ranks) of each run, on this machine.")] = 1,
    retry: Annotated[bool, typer.Option("--retry", help="Start runs again that have failed for good.")] = False,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Submit it to SLURM as an array, with so many nodes for each run.")
    ] = None,
    cluster: Annotated[str | None, typer.Option(help="Of an array: profile, as for `sluice submit`.")] = None,
    time: Annotated[str | None, typer.Option(help="Of an array: time limit of each run.")] = None,
    at_once: Annotated[
        int | None, typer.Option(min=1, metavar="M", help="Of an array: runs that train at the same time, at most.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the runs and what would be done; do nothing.")
    ] = False,
) -> None:
    """Train every combination of a sweep, each once; given again, goes on where it was."""
    from launch import local
    from launch import sweep as module
    from pipeline.core.errors import LaunchError

    asked = module.Asked(config, overrides or (), procs, retry)
    if nodes is not None:
        from launch.array import Shape, submit_sweep

        if procs > 1:
            raise LaunchError(
                "--procs is of this machine; under SLURM the cluster's profile says how many ranks there are"
            )
        return typer.echo(submit_sweep(asked, Shape(nodes, cluster, time, at_once), dry_run=dry_run))
    if cluster or time or at_once:
        raise LaunchError(
            "--cluster, --time and --at-once are of a SLURM array: say how many nodes a run has, --nodes N"
        )
    local.check_alone(os.environ)
    raise typer.Exit(module.sweep(asked, dry_run=dry_run))


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
    app.command("sweep")(sweep)
    app.command("runs")(runs)
    app.command("note")(note)
