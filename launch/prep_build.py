"""``sluice prep build``: one command per kind of source. Only what a command uses is imported, when it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from data_prep.options import Duplicates, FetchOptions, Filters, ImageOptions, Options
from data_prep.record import Source
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.registry import suggest

if TYPE_CHECKING:
    from data_prep.labels import Known
    from data_prep.sources.table import TableSource

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Build shards from a source.",
)


def _shared(  # noqa: PLR0913 - the options of one command
    out: Annotated[str, typer.Argument(help="Folder or fsspec URL that will hold train/, val/, ...", metavar="OUT")],
    split: Annotated[
        list[str] | None, typer.Option(help="Part of the samples in a split, val=0.05 if left out; val=0 for none.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides the splits and the order.")] = 0,
    shard_samples: Annotated[int, typer.Option(help="Most samples in a shard.")] = Options.shard_samples,
    shard_bytes: Annotated[int, typer.Option(help="Most bytes in a shard.")] = Options.shard_bytes,
    format: Annotated[str, typer.Option(help="keep, jpg, webp or png.")] = "keep",
    quality: Annotated[int, typer.Option(help="Of JPEG and WebP, 1 to 100.")] = ImageOptions.quality,
    resize: Annotated[str, typer.Option(help="none, short, long (that side becomes --size), crop (square).")] = "none",
    size: Annotated[int, typer.Option(help="Pixels, with --resize.")] = 0,
    enlarge: Annotated[bool, typer.Option("--enlarge", help="Also resize images that are smaller.")] = False,
    filter: Annotated[
        list[str] | None,
        typer.Option(help="min_side=, max_aspect=, min_area=, max_area=, min_caption=, max_caption=, caption=REGEX"),
    ] = None,
    duplicates: Annotated[str, typer.Option(help="off, report or drop samples like an earlier one.")] = "off",
    distance: Annotated[int, typer.Option(help="Look-alikes too: bits of 64 that may differ; -1: equal ones.")] = -1,
    workers: Annotated[int, typer.Option(help="Processes that read and encode; 0: none but this one.")] = 0,
    domain: Annotated[str, typer.Option(help="What the domain is called; left out: its folder, where it counts.")] = "",
    append: Annotated[bool, typer.Option("--append", help="Add to a complete data set, as new shards.")] = False,
) -> Options:
    """The options that all sources share. Its signature is the command line's."""
    del out, append
    image: dict[str, Any] = {
        "format": format,
        "quality": quality,
        "resize": resize,
        "size": size,
        "enlarge": enlarge,
    }
    duplicate: dict[str, Any] = {"action": duplicates, "distance": distance}
    return Options(
        splits=parse_splits(split or ["val=0.05"]),
        seed=seed,
        shard_samples=shard_samples,
        shard_bytes=shard_bytes,
        image=ImageOptions(**image),
        filters=Filters(**_settings(Filters, filter, "--filter")),
        duplicates=Duplicates(**duplicate),
        workers=workers,
        domain=domain,
    )


def parse_splits(given: list[str]) -> dict[str, float]:
    """Parts of splits written NAME=PART; those of 0 are left out."""
    parts = {name: _number(value, f"--split {name}") for name, value in _pairs(given, "--split").items()}
    return {name: part for name, part in parts.items() if part}


def _pairs(given: list[str] | None, what: str) -> dict[str, str]:
    pairs = [item.partition("=") for item in given or ()]
    wrong = [name for name, sign, _ in pairs if not sign]
    if wrong:
        raise ConfigError(f"{what} is written NAME=VALUE, not {wrong[0]!r}")
    return {name: value for name, _, value in pairs}


def _number(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{what} is a number, not {text!r}") from None


def _whole(text: str, what: str) -> int:
    number = _number(text, what)
    if not number.is_integer():
        raise ConfigError(f"{what} is a whole number, not {text!r}")
    return int(number)


def _settings(kind: type[Filters | FetchOptions], given: list[str] | None, what: str) -> dict[str, Any]:
    """Fields of a dataclass written NAME=VALUE; those that are yes or no have options of their own."""
    kinds: dict[str, type] = {f.name: type(f.default) for f in fields(kind) if type(f.default) is not bool}
    values: dict[str, Any] = {}
    for name, value in _pairs(given, what).items():
        if name not in kinds:
            raise ConfigError(f"{what}: unknown {name!r}; {suggest(name, list(kinds))}")
        read = {int: _whole, float: _number}.get(kinds[name])
        values[name] = read(value, f"{what} {name}") if read else value
    return values


Make = Callable[..., Source | tuple[Source, FetchOptions]]


def _source(make: Make) -> Make:
    """Register ``build NAME``: the parameters of ``make``, with OUT and the shared options.

    A parameter that ``make`` has in common with the shared ones (``seed``, ``out``) is given to both.
    """
    own, shared = _parameters(make), _parameters(_shared)
    out, *rest = shared.values()
    mine = [p for p in own.values() if p.name not in shared]
    arguments = [p for p in mine if p.default is inspect.Parameter.empty]
    options = [p for p in mine if p.default is not inspect.Parameter.empty]

    def command(**given: Any) -> None:
        from data_prep.progress import waiting

        options = _shared(**{name: given[name] for name in shared})
        try:
            with waiting("looking through the source"):
                made = make(**{name: given[name] for name in own})
        except OSError as error:
            raise DataError(f"the source cannot be read: {error}") from error
        source, fetch = made if isinstance(made, tuple) else (made, None)
        run_build(source, given["out"], replace(options, fetch=fetch), append=given["append"])

    parameters = [*arguments, out, *options, *rest]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = make.__doc__
    app.command(make.__name__)(command)
    return make


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """A function's parameters with their annotations evaluated."""
    hints = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters
    return {name: p.replace(annotation=hints[name]) for name, p in parameters.items()}


def run_build(source: Source, out: str, options: Options, *, append: bool = False) -> None:
    """Build with a progress bar and say what came out."""
    from data_prep.build import build
    from data_prep.describe import summary
    from data_prep.progress import Progress

    with Progress("building", source.total) as progress:
        built = build(source, out, options, append=append, progress=progress.counts)
    for manifest in built.manifests.values():
        typer.echo(summary(manifest))
    counts = built.counts
    if counts.rejects:
        typer.echo(f"{counts.rejects:,} of {counts.inputs:,} inputs rejected, see {out}/rejects.jsonl")


def _known(out: str, append: bool, classes: str) -> Known:
    """The classes of the data set that is added to, or those that are given."""
    from data_prep.dataset import data_sets, read_manifest
    from data_prep.labels import Known, read_classes
    from data_prep.store import open_store

    if classes:
        return Known(read_classes(classes), closed=True)
    if not append:
        return Known()
    store = open_store(data_sets(out)[0])  # all splits have the same classes
    try:
        return Known(read_manifest(store).classes)
    finally:
        store.close()


Pixels = Annotated[int, typer.Option(help="Side of an image.")]
ClassList = Annotated[
    str, typer.Option(help="The only classes there may be: a file with a name per line, or a data set that has them.")
]
Where = Annotated[str, typer.Option(help="""Which rows: 'vendor in ("a", "b") and score > 0.5'; left out: all.""")]


@_source
def folder(
    src: Annotated[str, typer.Argument(help="Folder of images.", metavar="SRC")],
    out: str,
    shuffle: Annotated[bool, typer.Option(help="Mix the order, so that shards hold many classes.")] = True,
    links: Annotated[bool, typer.Option("--links", help="Follow links to folders, and to outside of SRC.")] = False,
    layout: Annotated[
        str, typer.Option(help="What the folders in SRC are: splits, classes, flat (neither), or auto (looks).")
    ] = "auto",
    caption: Annotated[str, typer.Option(help="Key of name.json that holds the caption.")] = "caption",
    classes: ClassList = "",
    seed: int = 0,
    append: bool = False,
) -> Source:
    """Build from a folder: a sub-folder per split, class, or flat; captions in name.txt, metadata in name.json."""
    from data_prep.sources.folder import FolderSource

    kind: Any = layout
    source = FolderSource(src, shuffle, seed, _known(out, append, classes), links, kind, caption)
    if source.others:
        kinds = ", ".join(f"{n:,} {f'.{kind}' if kind else 'of none'}" for kind, n in source.others.most_common(5))
        typer.echo(f"passed over {source.others.total():,} files without an image's extension: {kinds}", err=True)
    return source


@_source
def table(  # noqa: PLR0913 - the options of one command
    src: Annotated[str, typer.Argument(help="CSV, TSV, JSON lines or Parquet; or a folder of them.", metavar="SRC")],
    out: str,
    image: Annotated[str, typer.Option(help="Column with path or bytes.")] = "image",
    caption: Annotated[list[str] | None, typer.Option(help="Column with a caption. May be repeated.")] = None,
    label: Annotated[str, typer.Option(help="Column with the class.")] = "",
    key: Annotated[str, typer.Option(help="Column that decides the split; left out: path, URL or hash.")] = "",
    root: Annotated[str, typer.Option(help="Folder that paths are relative to; left out: the table's.")] = "",
    where: Where = "",
    classes: ClassList = "",
    append: bool = False,
) -> Source:
    """Build from tables with paths or image bytes; columns without a role become metadata."""
    from data_prep.sources.table import Columns, TableSource

    columns = Columns(image, tuple(caption or ()), label, key)
    return _said(TableSource([src], columns, root, _known(out, append, classes), where))


def _said(source: TableSource) -> TableSource:
    """Say how many rows are passed over."""
    if source.left_out:
        typer.echo(f"--where takes {source.total:,} rows, and passes over {source.left_out:,}", err=True)
    return source


@_source
def urls(  # noqa: PLR0913 - the options of one command
    src: Annotated[str, typer.Argument(help="CSV, TSV, JSON lines or Parquet; or a folder of them.", metavar="SRC")],
    out: str,
    url: Annotated[str, typer.Option(help="Column with the URL.")] = "url",
    caption: Annotated[list[str] | None, typer.Option(help="Column with a caption. May be repeated.")] = None,
    label: Annotated[str, typer.Option(help="Column with the class.")] = "",
    expected: Annotated[str, typer.Option(help="Column with the MD5, SHA-1 or SHA-256 that must come.")] = "",
    where: Where = "",
    classes: ClassList = "",
    limit: Annotated[
        list[str] | None,
        typer.Option(help="concurrency=32, timeout=20, max_bytes=, retries=2, backoff=0.5, redirects=5, per_host=10."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Allow private and loopback addresses.")] = False,
    robots: Annotated[bool, typer.Option(help="Honour X-Robots-Tag.")] = True,
    append: bool = False,
) -> tuple[Source, FetchOptions]:
    """Build from tables with URLs, downloading them."""
    from data_prep.sources.table import Columns, TableSource

    columns = Columns(url, tuple(caption or ()), label, "", expected)
    fetch = FetchOptions(**_settings(FetchOptions, limit, "--limit"), private=private, robots=robots)
    return _said(TableSource([src], columns, "", _known(out, append, classes), where)), fetch


@_source
def tars(
    src: Annotated[str, typer.Argument(help="Tar, folder of tars, or {000..099}.tar.", metavar="SRC")],
    out: str,
    label: Annotated[str, typer.Option(help="cls, folder (the first in the key) or none.")] = "cls",
    image_field: Annotated[
        str, typer.Option(help="Member that is the image, input.jpg; left out: the first like jpg or png.")
    ] = "",
    caption: Annotated[str, typer.Option(help="Key of the .json member that holds the caption; left out: .txt.")] = "",
    classes: ClassList = "",
    append: bool = False,
) -> Source:
    """Build from existing tars, repacking them; to use them as they are, see `sluice prep index`."""
    from data_prep.scan import counted
    from data_prep.sources.tars import TarsSource

    kind: Any = label
    source = TarsSource([src], kind, _known(out, append, classes), image_field.lower().lstrip("."), caption)
    if source.passed:
        typer.echo(f"passed over: {counted(source.passed)}", err=True)
    return source


@_source
def torchvision(
    name: Annotated[str, typer.Argument(help="Name of the data set, like CIFAR10.")],
    src: Annotated[str, typer.Argument(help="Folder that holds it.", metavar="SRC")],
    out: str,
    train: Annotated[list[str] | None, typer.Option(help="Argument of the training split, train=true.")] = None,
    val: Annotated[list[str] | None, typer.Option(help="Argument of the validation split, train=false.")] = None,
    classes: ClassList = "",
    append: bool = False,
) -> Source:
    """Build from a torchvision data set that is on the disk."""
    from data_prep.sources.torchvision import TorchvisionSource

    splits = {"train": _arguments(train, "--train")} | ({"val": _arguments(val, "--val")} if val else {})
    return TorchvisionSource(name, src, splits, _known(out, append, classes))


def _arguments(given: list[str] | None, what: str) -> dict[str, Any]:
    known = {"true": True, "false": False}
    return {k: int(v) if v.isdigit() else known.get(v.lower(), v) for k, v in _pairs(given, what).items()}


@_source
def glyphs(
    characters: Annotated[int, typer.Option(help="Classes.")] = 200,
    samples: Annotated[int, typer.Option(help="Images per character and typeface.")] = 10,
    pixels: Pixels = 32,
    seed: int = 0,
    variation: Annotated[
        float, typer.Option(help="How much turn, scale, place and colours vary: 0 is upright black on white.")
    ] = 1.0,
) -> Source:
    """Build the embedded data: Unicode characters in many typefaces, some of them only in val."""
    from data_prep.sources.glyphs import GlyphsSource

    return GlyphsSource(characters, samples, pixels, seed, variation)


@_source
def scenes(
    characters: Annotated[int, typer.Option(help="Classes beside the background.")] = 20,
    train: Annotated[int, typer.Option(help="Scenes to learn from.")] = 2000,
    val: Annotated[int, typer.Option(help="Scenes of typefaces that train does not show.")] = 400,
    most: Annotated[int, typer.Option(help="Most characters in a scene.")] = 5,
    pixels: Pixels = 64,
    seed: int = 0,
) -> Source:
    """Build scenes of several characters with exact masks (mask.png), for segmentation."""
    from data_prep.sources.scenes import ScenesSource

    return ScenesSource(characters, train, val, most, pixels, seed)


@_source
def digits(
    pixels: Pixels = 32,
    held_out: Annotated[int, typer.Option(help="So many, chosen by their keys, make val; 0: as --split says.")] = 0,
) -> Source:
    """Build scikit-learn's 1,797 handwritten digits."""
    from data_prep.sources.digits import DigitsSource

    return DigitsSource(pixels, held_out=held_out)


@_source
def typefaces(
    digits: Annotated[int, typer.Option(help="Classes: the digits from zero on.")] = 10,
    samples: Annotated[int, typer.Option(help="Images per digit and typeface.")] = 15,
    pixels: Pixels = 32,
    seed: int = 0,
) -> Source:
    """Build digits set in type, made into pixels as the handwritten ones were: another domain of the same classes."""
    from data_prep.sources.typefaces import TypefacesSource

    return TypefacesSource(digits, samples, pixels, seed)
