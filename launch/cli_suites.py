"""Verbs of ``sluice`` that evaluate or wait in a queue: ``submit`` and ``eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.cli_options import Overrides, Procs, again

Weights = Annotated[list[str] | None, typer.Option(help='Of checkpoints: "model", "ema" or a width. May be repeated.')]
Include = Annotated[
    list[Path] | None, typer.Option(metavar="DIR", help="Find suites in this folder too. May be repeated.")
]


def submit(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A run or shards to prepare (TOML); or a suite, by file or name.")
    ],
    overrides: Overrides,
    subjects: Annotated[
        list[str] | None, typer.Argument(metavar="SUBJECT...", help="Of a suite: what is evaluated, as `sluice eval`.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the job.")] = 1,
    cluster: Annotated[str | None, typer.Option(help="Profile: slurm/profiles/NAME.toml, or a file.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit, as sbatch reads it; else the profile's.")] = None,
    array: Annotated[str | None, typer.Option(help="Tasks that prepare shards: 0-99, or 0-99%8.")] = None,
    after: Annotated[str | None, typer.Option(metavar="JOB", help="Start when this job has ended.")] = None,
    at_once: Annotated[
        int | None, typer.Option(min=1, metavar="M", help="Of a suite: subjects evaluated at the same time, at most.")
    ] = None,
    procs: Annotated[int | None, typer.Option(min=1, help="Of a suite: ranks for a subject, on one node.")] = None,
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option(help="Of a suite: folder for the results; left out: each run's.")] = None,
    include: Include = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the job and the checks; submit nothing.")] = False,
) -> None:
    """Check a job thoroughly, and put it into SLURM's queue: a run, shards, or a suite as an array of subjects."""
    from launch.evaluate import checked_weights
    from launch.suites import suite_meant
    from pipeline.core.errors import ConfigError

    again(Path(config))
    suite = suite_meant(config, subjects or [], include or [])
    own = {"--at-once": at_once, "--procs": procs, "--weights": weights, "--out": out, "--include": include}
    foreign = {"--array": array, "--nodes": nodes if nodes > 1 else None} if suite else own
    if wrong := [name for name, value in foreign.items() if value]:
        raise ConfigError(f"{wrong[0]} does not belong to {config}, which is {'a' if suite else 'no'} suite")
    if suite is None:
        from launch.submit import Request
        from launch.submit import submit as put

        request = Request(Path(config), overrides, nodes, cluster, time, array, after)
        return typer.echo(put(request, dry_run=dry_run))
    from launch.evaluations import Order, submit_suite

    order = Order(
        suite,
        subjects or [],
        overrides,
        [checked_weights(w) for w in weights or []],
        out,
        procs or 1,
        cluster,
        time,
        after,
        at_once,
    )
    typer.echo(submit_suite(order, dry_run=dry_run))


def evaluate(
    overrides: Overrides,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SUBJECT... SUITE", help="Runs, checkpoints or other weights; then a suite, by file or name."
        ),
    ] = None,
    random_init: Annotated[
        bool, typer.Option("--random-init", help="Untrained weights of the same shape, for comparison: random:SUBJECT.")
    ] = False,
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results and report; left out: each run's.")] = None,
    again: Annotated[
        bool, typer.Option("--again/--missing", help="Measure everything anew, or only what is not there yet.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="The first N samples of each stream alone, for a trial.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Evaluate a run's checkpoints as they appear, until the run has ended.")
    ] = False,
    procs: Procs = 1,
    include: Include = None,
    show: Annotated[bool, typer.Option("--list", help="Show what suites and evaluations there are.")] = False,
    validate: Annotated[
        str | None, typer.Option(metavar="SUITE", help="Say whether a suite is sound; evaluate nothing.")
    ] = None,
) -> None:
    """Run a suite of evaluations on runs (their newest checkpoint), checkpoints, exports or other weights."""
    from launch.suites import listing

    if show:
        return typer.echo(listing(include or []))
    from launch import evaluate as module

    if validate is not None:
        return typer.echo(module.validate(validate, include or [], overrides))
    wish = module.Wish(names or [], overrides, include or [], weights or [], random_init, out, again, limit, procs)
    if watch:
        from launch.watch import watch as follow

        raise typer.Exit(follow(wish))
    raise typer.Exit(module.evaluate(wish))


def add(app: typer.Typer) -> None:
    """Add the verbs to the command."""
    app.command("submit")(submit)
    app.command("eval")(evaluate)
