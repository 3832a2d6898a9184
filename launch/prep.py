"""``sluice prep``: images in, verified shards out. Only what a command uses is imported, when it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, ParamSpec

import typer

from launch import prep_build
from launch.cli_options import Config, Overrides, Procs, again
from pipeline.core.errors import DataError
from pipeline.core.location import join
from pipeline.core.manifest import Manifest

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Prepare, verify and describe shards.",
)
app.add_typer(prep_build.app, name="build")

P = ParamSpec("P")


def _verb(command: Callable[P, None]) -> Callable[P, None]:
    """Register a command. What the system refuses (permission, a full disk, a server) is the user's to mend."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except OSError as error:
            raise DataError(f"{command.__name__} stopped: {error}") from error

    app.command()(run)
    return command


DataSet = Annotated[str, typer.Argument(help="Data set: the folder or URL with the shards.", metavar="FOLDER")]
DataSets = Annotated[str, typer.Argument(help="Data set, or what a build made: all its splits.", metavar="FOLDER")]


@_verb
def index(
    folder: DataSet,
    tars: Annotated[str, typer.Option(help="Which tars: {000..099}.tar; left out: all.")] = "",
    classes: Annotated[
        str, typer.Option(help="Names of the labels: a file with one per line, in order, or a data set that has them.")
    ] = "",
    domain: Annotated[str, typer.Option(help="What its domain is called; left out: as before, or its folder.")] = "",
    image_field: Annotated[
        str, typer.Option(help="Member that is the image, input.jpg; left out: those like jpg or png.")
    ] = "",
    skip: Annotated[bool, typer.Option("--skip", help="Leave damaged tars out.")] = False,
) -> None:
    """Take existing WebDataset tars as they are: look through them, write indexes and a manifest beside them."""
    from data_prep.describe import summary
    from data_prep.index import index as run
    from data_prep.labels import read_classes
    from data_prep.progress import Progress
    from data_prep.scan import counted

    names = read_classes(classes) if classes else ()
    image = image_field.lower().lstrip(".")
    with Progress("indexing", None, "tars") as progress:
        manifest = run(
            folder,
            pattern=tars,
            classes=names,
            domain=domain,
            image=image,
            skip_damaged=skip,
            progress=progress.of,
        )
    typer.echo(summary(manifest))
    indexed = manifest.made["indexed"]
    for line in indexed["left_out"]:
        typer.echo(f"left out: {line}")
    if indexed.get("passed_over"):
        typer.echo(
            f"passed over: {counted(indexed['passed_over'])}; `sluice prep build tars` follows links within a tar"
        )
    if indexed.get("no_class"):
        typer.echo(
            f"{indexed['no_class']:,} labels are not the number of one of {len(manifest.classes):,} classes: name all "
            "classes with --classes FILE, or let `sluice prep build tars` number what are names"
        )


def _manifest(folder: str) -> Manifest:
    from data_prep.dataset import read_manifest
    from data_prep.store import open_store

    store = open_store(folder)
    try:
        return read_manifest(store)
    finally:
        store.close()


@_verb
def verify(
    folder: DataSets,
    decode: Annotated[float, typer.Option(min=0, max=1, help="Part of the samples to decode; 1: all.")] = 0.0,
) -> None:
    """Check shards against their manifest; exit code 2 and a list of damaged shards if they do not keep it."""
    from data_prep.dataset import data_sets
    from data_prep.progress import Progress
    from data_prep.verify import verify as run

    damaged: list[str] = []
    for place in data_sets(folder):
        with Progress("verifying", len(_manifest(place).shards), "shards") as progress:
            report = run(place, decode, progress.update)
        if report.problems:
            damaged.append(f"{len(report.problems)} of {report.shards} files of {place} are damaged:")
            damaged += [f"  {name}: {p}" for name, problems in report.problems.items() for p in problems]
            continue
        typer.echo(
            f"{place}: {report.shards:,} shards with {report.samples:,} samples are whole, {report.decoded:,} decoded"
        )
    if damaged:
        raise DataError("\n".join(damaged))


@_verb
def stats(
    folder: DataSets,
    renew: Annotated[bool, typer.Option("--renew", help="Decode everything and write the statistics again.")] = False,
) -> None:
    """Show what the manifest says about the data."""
    from data_prep.dataset import data_sets
    from data_prep.describe import renew_statistics
    from data_prep.progress import Progress

    for number, place in enumerate(data_sets(folder)):
        manifest = _manifest(place)
        if renew:
            with Progress("decoding", manifest.samples, "samples") as progress:
                manifest = renew_statistics(place, progress.update)
        if number:
            typer.echo()
        _print(manifest)


def _print(manifest: Manifest) -> None:
    from data_prep.describe import table

    rows = table(manifest)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")


@_verb
def show(
    folder: DataSet,
    out: Annotated[str, typer.Option(help="Where to write; .png and .html are added; left out: sheet in FOLDER.")] = "",
    samples: Annotated[int, typer.Option(min=1, help="How many.")] = 48,
) -> None:
    """Write a contact sheet as PNG and HTML, beside the shards, and print a table."""
    from data_prep.describe import sheet, write_sheet

    manifest = _manifest(folder)
    picture, page = sheet(folder, samples)
    out = out or f"{folder.rstrip('/')}/sheet"
    write_sheet(picture, page, out)
    _print(manifest)
    typer.echo(f"see {out}.png and {out}.html")


@_verb
def tokenizer(
    folder: DataSet,
    vocabulary: Annotated[int, typer.Option(help="Most entries.")] = 8192,
    field: Annotated[list[str] | None, typer.Option(help="Field with text; caption if left out.")] = None,
) -> None:
    """Train a byte-level BPE tokenizer from the captions."""
    from data_prep.progress import Progress
    from data_prep.tokenizer import train_tokenizer

    with Progress("reading captions", _manifest(folder).samples, "samples") as progress:
        manifest = train_tokenizer(folder, vocabulary, tuple(field or ("caption",)), progress.update)
    typer.echo(f"{folder}/{manifest.tokenizer['file']}: sha256 {manifest.tokenizer['sha256']}")


@_verb
def split(
    folder: DataSet,
    out: Annotated[str, typer.Argument(help="Folder that will hold train/ and the splits.", metavar="OUT")],
    part: Annotated[list[str], typer.Option("--split", help="Part of the samples in a split: val=0.05.")],
    seed: Annotated[int, typer.Option(help="Decides the splits.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that read and check; 0: none but this one.")] = 0,
) -> None:
    """Deal a data set out into splits, by a hash of each sample's key."""
    from data_prep.options import Options
    from data_prep.sources.tars import TarsSource

    manifest = _manifest(folder)
    source = TarsSource([join(folder, shard.name) for shard in manifest.shards])
    prep_build.run_build(source, out, Options(prep_build.parse_splits(part), seed, workers=workers))


@_verb
def merge(
    folders: Annotated[list[str], typer.Argument(help="Data sets to put together.", metavar="FOLDER")],
    out: Annotated[str, typer.Argument(help="Folder that is made.", metavar="OUT")],
) -> None:
    """Make one data set of several, their classes by name; shards are linked, or copied to another disk."""
    from data_prep.describe import summary
    from data_prep.merge import merge as run
    from data_prep.progress import Progress

    with Progress("merging", None, "shards") as progress:
        manifest = run(folders, out, progress.of)
    typer.echo(summary(manifest))


@_verb
def embed(
    config: Config,
    overrides: Overrides,
    procs: Procs = 1,
    top: Annotated[int | None, typer.Option(min=1, help="Store so many of the logits; left out: all.")] = None,
    precision: Annotated[str, typer.Option(metavar="float16|float32", help="Of what is stored.")] = "float16",
) -> None:
    """Compute what the teachers of a distillation make of every sample, once, for all runs that read it."""
    from launch.evaluate import start
    from launch.local import become
    from pipeline.config.exitcodes import CRASH
    from pipeline.config.load import load_run
    from pipeline.core.errors import ConfigError

    load_run(again(config), overrides)
    if precision not in ("float16", "float32"):
        raise ConfigError(f"--precision {precision}: write float16 or float32")
    words = [word for override in overrides for word in ("--set", override)]
    arguments = ["embed", "--config", str(config), "--precision", precision, *words]
    arguments += [] if top is None else ["--top", str(top)]
    if procs == 1:
        become(arguments)
    code = start(arguments, procs, "embedding")
    raise typer.Exit(CRASH if code is None else code)
