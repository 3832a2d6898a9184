"""Verbs of ``sluice`` about results: ``report``, ``compare``, ``choose`` and ``advise``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from launch.cli_options import Procs


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


def advise(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Shards with labels: what is to be learnt.")],
    encoder: Annotated[
        str, typer.Option(metavar="SUBJECT", help="A run, checkpoint, export or timm model, as `eval`.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for results and the advice.")] = Path("advice"),
    held_out: Annotated[
        float,
        typer.Option(min=0.01, max=0.9, metavar="SHARE", help="Of the data, held out to measure on."),
    ] = 0.2,
    try_for: Annotated[
        str | None, typer.Option("--try", metavar="LENGTH", help="Fine-tune for so long in each way: 20ep, 500ba.")
    ] = None,
    procs: Procs = 1,
) -> None:
    """Say which way of fine-tuning suits a data set and an encoder, and by which figures. No test set is looked at."""
    from launch.advise import Question
    from launch.advise import advise as answer

    typer.echo(answer(Question(data, encoder, out, held_out, try_for, procs)))


def add(app: typer.Typer) -> None:
    """Add the verbs to the command."""
    app.command("report")(report)
    app.command("compare")(compare)
    app.command("choose")(choose)
    app.command("advise")(advise)
