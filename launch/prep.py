"""``sluice prep``: images in, verified shards out. Only what a command uses is imported, when it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from data_prep.options import Duplicates, Filters, ImageOptions, Options
from data_prep.record import Source
from pipeline.core.errors import ConfigError

app = typer.Typer(help="Prepare, verify and describe shards.", no_args_is_help=True)
build_app = typer.Typer(help="Build shards from a source.", no_args_is_help=True)
app.add_typer(build_app, name="build")


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
    splits = {k: _number(v, f"--split {k}") for k, v in (_pairs(split, "--split") or {"val": "0.05"}).items()}
    return Options(
        splits={name: part for name, part in splits.items() if part},
        seed=seed,
        shard_samples=shard_samples,
        shard_bytes=shard_bytes,
        image=ImageOptions(**image),
        filters=_filters(filter),
        duplicates=Duplicates(**duplicate),
        workers=workers,
    )


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


def _filters(given: list[str] | None) -> Filters:
    from dataclasses import fields

    from pipeline.core.registry import suggest

    kinds: dict[str, type] = {f.name: type(f.default) for f in fields(Filters)}
    values: dict[str, Any] = {}
    for name, value in _pairs(given, "--filter").items():
        if name not in kinds:
            raise ConfigError(f"unknown filter {name!r}; {suggest(name, list(kinds))}")
        values[name] = value if kinds[name] is str else kinds[name](_number(value, f"--filter {name}"))
    return Filters(**values)


def _source(make: Callable[..., Source]) -> Callable[..., Source]:
    """Register ``build NAME``: the parameters of ``make``, with OUT and the shared options."""
    own, shared = _parameters(make), _parameters(_shared)
    out, *rest = shared.values()
    mine = [p for p in own.values() if p.name not in shared]
    arguments = [p for p in mine if p.default is inspect.Parameter.empty]
    options = [p for p in mine if p.default is not inspect.Parameter.empty]

    def command(**given: Any) -> None:
        theirs = {name: given[name] for name in shared}
        source = make(**{name: given[name] for name in own})
        _build(source, given["out"], _shared(**theirs), append=given["append"])

    parameters = [*arguments, out, *options, *rest]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = make.__doc__
    build_app.command(make.__name__)(command)
    return make


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """A function's parameters with their annotations evaluated."""
    hints = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters
    return {name: p.replace(annotation=hints[name]) for name, p in parameters.items()}


def _build(source: Source, out: str, options: Options, *, append: bool) -> None:
    """Build with a progress bar and say what came out."""
    from data_prep.build import build
    from data_prep.progress import Progress

    with Progress("building", source.total) as progress:
        built = build(source, out, options, append=append, progress=progress.counts)
    for split, manifest in built.manifests.items():
        typer.echo(f"{split}: {manifest.samples:,} samples in {len(manifest.shards):,} shards at {manifest.root}")
    counts = built.counts
    if counts.rejects:
        typer.echo(f"{counts.rejects:,} of {counts.inputs:,} inputs rejected, see {out}/rejects.jsonl")


Folder = Annotated[str, typer.Argument(help="Folder of images.", metavar="SRC")]


@_source
def folder(
    src: Folder,
    shuffle: Annotated[bool, typer.Option(help="Mix the order, so that shards hold many classes.")] = True,
    seed: int = 0,
) -> Source:
    """Build from a folder: one sub-folder per class, or flat; with captions in name.txt, metadata in name.json."""
    from data_prep.sources.folder import FolderSource

    return FolderSource(src, shuffle=shuffle, seed=seed)


@_source
def glyphs(
    characters: Annotated[int, typer.Option(help="Classes.")] = 200,
    samples: Annotated[int, typer.Option(help="Images per character and typeface.")] = 10,
    pixels: Annotated[int, typer.Option(help="Side of an image.")] = 32,
    seed: int = 0,
) -> Source:
    """Build the embedded data: Unicode characters in many typefaces, some of them only in val."""
    from data_prep.sources.glyphs import GlyphsSource

    return GlyphsSource(characters, samples, pixels, seed)


@_source
def digits(pixels: Annotated[int, typer.Option(help="Side of an image.")] = 32) -> Source:
    """Build scikit-learn's 1,797 handwritten digits."""
    from data_prep.sources.digits import DigitsSource

    return DigitsSource(pixels)
