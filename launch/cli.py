"""The ``sluice`` command. Modules are imported by the command that needs them, so that ``--help`` is quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from launch import cli_results, cli_runs, cli_suites
from launch.cli_options import Config, Overrides, Procs, again
from pipeline.core.errors import SluiceError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="From sharded streams of images to evaluated checkpoints.",
)

CLOSED = 141
"""Exit code of a command whose output nobody reads any more: as the shell gives it for SIGPIPE."""


@app.command(
    "prep",
    help="Turn folders, tables and tars into verified shards.",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def prep(context: typer.Context) -> None:
    """Hand the rest of the line to ``launch.prep``, which imports what reads and writes images."""
    from launch.prep import app as prep_app
    from pipeline.record.logs import outlive_readers

    outlive_readers()
    prep_app(args=context.args, prog_name="sluice prep")


@app.command("init")
def init(
    folder: Annotated[Path, typer.Argument(help="Folder for the files; nothing in it is replaced.")],
    recipe: Annotated[str, typer.Option(metavar="NAME", help="Which run: pretrain/clip_b16_datacomp_large.")] = (
        "demo/mae_glyphs"
    ),
    suite: Annotated[str, typer.Option(metavar="NAME", help="Which suite of evaluations.")] = "eval/glyphs50",
) -> None:
    """Copy a recipe, a suite and a cluster's profile to start from."""
    from launch.init import copy_start

    typer.echo(copy_start(folder, recipe, suite))


@app.command("check")
def check(config: Config, overrides: Overrides, procs: Procs = 1) -> None:
    """Check a configuration and show what a run of it would do."""
    from launch.check import check as run_check

    run_check(config, overrides, procs)


@app.command("look")
def look(
    config: Config,
    overrides: Overrides,
    samples: Annotated[int, typer.Option("-n", "--samples", min=1, help="How many of the first batch.")] = 16,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("look.html"),
) -> None:
    """Make a page of what the model will see, before anything is trained: crops, views, masks, texts as tokens."""
    from pipeline.config.load import load_run

    load_run(again(config), overrides)
    words = [word for override in overrides for word in ("--set", override)]
    _become(["look", "--config", str(config), "--samples", str(samples), "--out", str(out), *words])


@app.command("plan")
def plan(
    what: Annotated[str, typer.Argument(metavar="CONFIG|DATA", help="A run (TOML); or a data set: folder or URL.")],
    overrides: Overrides,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the run.")] = 1,
    procs: Annotated[int, typer.Option("--gpus-per-node", "--procs", min=1, help="Ranks per node.")] = 8,
    images_per_second: Annotated[float, typer.Option(min=1, help="That all ranks together take.")] = 1000.0,
    global_batch: Annotated[int | None, typer.Option(min=1, help="Of a data set: samples per step.")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Of a data set: samples per rank; left out: no accumulation.")
    ] = None,
    lanes: Annotated[int | None, typer.Option(min=1, help="Of a data set: as data.lanes.")] = None,
    window: Annotated[int, typer.Option(min=1, help="Of a data set: as data.window.")] = 4,
) -> None:
    """Show what a run of this shape needs: memory, traffic, time, disk, shards. Of a data set: what it would read."""
    from launch import plan as module
    from pipeline.core.errors import ConfigError

    if what.endswith(".toml"):
        if global_batch or micro_batch or lanes:
            raise ConfigError("a configuration says its own batch and lanes; change them by --set")
        text = module.plan_run(Path(what), overrides, nodes=nodes, procs=procs, images_per_second=images_per_second)
    elif overrides or global_batch is None:
        raise ConfigError(
            "a data set needs --global-batch (samples per step) and takes no --set; a run is named by its .toml"
        )
    else:
        text = module.plan_data(
            what,
            nodes=nodes,
            procs=procs,
            global_batch=global_batch,
            micro_batch=micro_batch,
            lanes=lanes,
            window=window,
            images_per_second=images_per_second,
        )
    typer.echo(text)


@app.command("train")
def train(
    config: Config,
    overrides: Overrides,
    procs: Procs = 1,
    hostfile: Annotated[
        Path | None, typer.Option(help="Train on these hosts over ssh: lines 'worker-1 slots=8'.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Hosts, when started by hand on each.")] = 1,
    node_rank: Annotated[int, typer.Option(help="Number of this host, from 0.")] = 0,
    master: Annotated[
        str | None, typer.Option(metavar="ADDRESS[:PORT]", help="Host 0, as the others reach it.")
    ] = None,
) -> None:
    """Train on this machine, or on several; resumes when the run folder holds a checkpoint."""
    from launch import local
    from launch.hosts import by_hand
    from pipeline.config import provenance
    from pipeline.config.load import load_run
    from pipeline.core.errors import LaunchError

    checked = load_run(again(config), overrides)
    if master is None:
        local.check_alone(os.environ)
    if master is None or provenance.COMMAND not in os.environ:  # a SLURM job's agent tells what was submitted
        os.environ |= provenance.command_variable(["sluice", *sys.argv[1:]])
    if hostfile is not None:
        if master is not None or nodes > 1 or procs > 1:
            raise LaunchError("--hostfile says which hosts and how many ranks; leave --procs, --nodes, --master out")
        raise typer.Exit(local.train_hosts(checked, config, overrides, hostfile))
    if nodes > 1 and master is None:
        raise LaunchError("several hosts need --master ADDRESS[:PORT] of host 0, the same on each")
    if master is not None:
        part = by_hand(master, nodes, node_rank, procs)
        raise typer.Exit(local.train_part(checked, config, overrides, part))
    raise typer.Exit(local.train(checked, config, overrides, procs))


@app.command("export")
def export(
    run: Annotated[Path, typer.Argument(help="Run folder, or one of its checkpoints.")],
    out: Annotated[Path, typer.Argument(help="Folder for the files.")],
    image_size: Annotated[
        tuple[int, int] | None, typer.Option(min=1, help="Resample the encoder to images of this height and width.")
    ] = None,
    patch_size: Annotated[
        tuple[int, int] | None, typer.Option(min=1, help="Resample the encoder to patches of this height and width.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help='"model" as trained, "ema", or the relative width of a power-function average.')
    ] = "model",
) -> None:
    """Write the encoder as timm loads it, the whole objective, and what other libraries can load of it."""
    folder, checkpoint = _run_and_checkpoint(run)
    arguments = ["export", "--run", str(folder), "--out", str(out), "--weights", weights]
    if checkpoint:
        arguments += ["--checkpoint", str(checkpoint)]
    for name, size in (("--image-size", image_size), ("--patch-size", patch_size)):
        if size:
            arguments += [name, *map(str, size)]
    _become(arguments)


Run = Annotated[Path, typer.Argument(help="Run folder.")]


@app.command("status")
def status(
    runs: Annotated[list[Path] | None, typer.Argument(help="Run folders; left out: all below runs/.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every two seconds.")] = False,
) -> None:
    """Show where runs are: queued, running, finished or failed, how far, how fast, what is wrong."""
    from launch import status as module

    module.show(runs or [], watch)


@app.command("logs")
def logs(
    run: Run,
    rank: Annotated[int, typer.Option(min=0, help="Whose output.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what comes.")] = False,
) -> None:
    """Print what a rank has printed in its last attempt."""
    from launch.control import read_log

    for part in read_log(run, rank, follow):
        sys.stdout.buffer.write(part)
        sys.stdout.flush()


@app.command("replay")
def replay(
    run: Run,
    step: Annotated[int, typer.Option(min=1, help="Which; the log and failures count alike.")],
) -> None:
    """Do a past step again, on this machine, from the checkpoint before it: samples, losses, gradients by layer."""
    folder, _ = _run_and_checkpoint(run)
    _become(["replay", "--run", str(folder), "--step", str(step)])


@app.command("losses")
def losses(
    run: Run,
    by: Annotated[str, typer.Option(metavar="worst|forgotten|late", help="Which samples come first.")] = "worst",
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="How many.")] = 20,
    out: Annotated[Path | None, typer.Option(help="Write their numbers into a file, for data.keep.")] = None,
    others: Annotated[bool, typer.Option("--others", help="Into that file go all samples but these.")] = False,
    source: Annotated[str | None, typer.Option(help="Of several data sets the one whose numbers are written.")] = None,
) -> None:
    """List the samples with the highest loss, the forgotten or the late learnt, where record.losses kept them."""
    from launch.losses import ORDERS, show
    from pipeline.core.errors import ConfigError

    if by not in ORDERS:
        raise ConfigError(f"--by {by}: write {', '.join(ORDERS)}")
    typer.echo(show(run, by, count, out, others, source))


@app.command("cancel")
def cancel(run: Run) -> None:
    """Ask a run to save and end, in SLURM or here."""
    from launch.control import cancel as ask

    typer.echo(ask(run))


@app.command("resume")
def resume(
    run: Run,
    from_step: Annotated[
        int | None, typer.Option(min=0, help="Go back to this checkpoint; later ones are put aside.")
    ] = None,
) -> None:
    """Go on with a run that was stopped or died, as it was started, with the configuration in its folder."""
    from launch.control import resume as go_on

    go_on(run, from_step)


@app.command("board")
def board(run: Run, port: Annotated[int, typer.Option(min=1, max=65535, help="On this machine.")] = 6006) -> None:
    """Show a run's curves in TensorBoard, to this machine alone."""
    from launch.control import board as show

    show(run, port)


cli_runs.add(app)
cli_suites.add(app)
cli_results.add(app)


def _run_and_checkpoint(path: Path) -> tuple[Path, Path | None]:
    """The run folder (it holds config.toml) and the checkpoint inside it that ``path`` names, if any."""
    from pipeline.core.errors import LaunchError

    checkpoint = (path / "checkpoint.json").is_file()
    for folder in (path, *path.parents):
        if (folder / "config.toml").is_file() and (folder == path or checkpoint):
            return folder, None if folder == path else path
    if checkpoint:  # taken out of its run: what is measured is written beside it
        return path, path
    raise LaunchError(f"{path} is neither a run folder nor a checkpoint: no config.toml or checkpoint.json there")


def _become(arguments: list[str]) -> NoReturn:
    """Replace this process by ``pipeline.run``, so that signals and the exit code are its own."""
    from launch.local import become

    become(arguments)


def main() -> None:
    """Entry point: errors that the user can mend are one message and exit code 2, without a traceback."""
    try:
        app()
    except SluiceError as error:
        print(f"sluice: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # nobody reads any more, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(CLOSED)
