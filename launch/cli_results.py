"""Verbs of ``sluice`` about results: ``report``, ``compare`` and ``choose``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class ReportFormat(StrEnum):
    """What results are written as."""

    html = "html"
    text = "text"
    md = "md"
    csv = "csv"
    json = "json"
    clip_benchmark = "clip_benchmark"
    datacomp = "datacomp"


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders of results.")],
    format: Annotated[
        ReportFormat | None,
        typer.Option(
            "--format", help="How; left out: of one run a page, of several a table. The last two: --out FOLDER."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File or folder to write; left out: report.html in the run, or standard output.")
    ] = None,
) -> None:
    """Show results: of one run its page with curves, pictures and results; of several all results side by side."""
    arguments = ["report", *(word for run in runs for word in ("--run", str(run)))]
    arguments += ["--format", format.value] if format else []
    from launch.local import become

    become([*arguments, *(["--out", str(out)] if out else [])])


class Format(StrEnum):
    """What a comparison is written as."""

    text = "text"
    md = "md"
    csv = "csv"
    json = "json"


def compare(
    subjects: Annotated[
        list[str],
        typer.Argument(
            metavar="A B...",
            help="Runs or folders of results (their newest checkpoint), RUN@STEP, RUN@MODEL, RUN@all, a checkpoint; "
            "or a run and names of models in it. All are compared with the first.",
        ),
    ],
    format: Annotated[Format, typer.Option("--format", help="How it is written.")] = Format.text,
    out: Annotated[Path | None, typer.Option(help="File to write; left out: standard output.")] = None,
) -> None:
    """Say whether models differ: differences with intervals, sample by sample, p corrected, and what n can show."""
    arguments = ["compare", "--format", format.value, *(["--out", str(out)] if out else [])]
    from launch.local import become

    become([*arguments, "--", *subjects])


def choose(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run whose checkpoints were evaluated.")],
    metric: Annotated[str, typer.Argument(metavar="METRIC", help="What is reported: accuracy/top1.")] = "accuracy/top1",
    out: Annotated[Path | None, typer.Option(help="File to write; left out: standard output.")] = None,
) -> None:
    """Take a checkpoint by rules that never see the target's labels: last, source, IWV, entropy, SND, BNM."""
    from launch.local import become

    become(["choose", *(["--out", str(out)] if out else []), "--", str(run), metric])


def add(app: typer.Typer) -> None:
    """Add the verbs to the command."""
    app.command("report")(report)
    app.command("compare")(compare)
    app.command("choose")(choose)
