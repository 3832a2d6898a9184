"""``sluice prep stats`` and ``sluice prep show``: what is in a data set, as numbers and as pictures."""

from __future__ import annotations

import base64
import functools
import html
import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from data_prep import images
from data_prep.ahead import cores, in_order
from data_prep.dataset import items, read_manifest
from data_prep.labels import label_number
from data_prep.record import Rejected, shortened
from data_prep.statistics import Facts, Statistics, channel_sums
from data_prep.store import Store, open_store
from pipeline.core.classes import shown
from pipeline.core.errors import DataError
from pipeline.core.manifest import FILE, Manifest, Shard

TILE, MARGIN, LINE = 128, 8, 14
SHOWN = 2000
"""Characters of a caption that a page shows."""


def renew_statistics(folder: str, progress: Callable[[int], None] | None = None) -> Manifest:
    """Decode everything and write the statistics into the manifest.

    Raises:
        DataError: no manifest, or an image that cannot be decoded.
    """
    store = open_store(folder)
    try:
        manifest = read_manifest(store)
        statistics = Statistics()
        with ThreadPoolExecutor(cores()) as pool:
            work = functools.partial(_shard_statistics, store, manifest)
            for _, found in in_order(pool, work, manifest.shards, 2 * cores()):
                statistics.merge(found)
                if progress is not None:
                    progress(statistics.samples)
        manifest = replace(manifest, statistics=statistics.as_json())
        store.write(FILE, manifest.as_json().encode())
        return manifest
    finally:
        store.close()


def _shard_statistics(store: Store, manifest: Manifest, shard: Shard) -> Statistics:
    statistics = Statistics()
    for item in items(store, replace(manifest, shards=(shard,)), ("image", "caption", "label")):
        try:
            statistics.add(_facts(item.fields))
        except Rejected as reason:
            raise DataError(
                f"{shard.name}: {item.key}: {reason}; find all such samples with `sluice prep verify --decode 1`"
            ) from reason
    return statistics


def _facts(fields: dict[str, bytes]) -> Facts:
    caption = fields.get("caption")
    length = None if caption is None else len(caption.decode("utf-8", "replace"))
    number = label_number(fields.get("label", b""))
    data = fields.get("image")
    if data is None:
        return Facts(None, None, None, length, number)
    pixels = images.decode(data)[0].pixels
    return Facts(*pixels.size, len(data), length, number, channel_sums(pixels))


def table(manifest: Manifest) -> list[tuple[str, str]]:
    """Name and value of what there is to say about a data set."""
    s = manifest.statistics
    rows = [
        ("folder", manifest.root),
        ("samples", f"{manifest.samples:,}"),
        ("shards", f"{len(manifest.shards):,}, {sum(x.bytes for x in manifest.shards) / 1e6:,.1f} MB"),
        ("fields", ", ".join(f"{name} ({', '.join(e)})" for name, e in manifest.fields.items())),
        ("classes", f"{len(manifest.classes):,}" + (f" ({shown(manifest.classes)})" if manifest.classes else "")),
        ("fingerprint", manifest.fingerprint),
    ]
    for name, m in s.get("measures", {}).items():
        mean = m["sum"] / m["count"]
        rows.append((name.replace("_", " "), f"{m['min']:,} to {m['max']:,}, mean {mean:,.1f} of {m['count']:,}"))
    if labels := s.get("labels"):
        rows.append(("samples per class", f"{min(labels.values()):,} to {max(labels.values()):,} in {len(labels):,}"))
    for name in ("mean", "std"):
        if name in s:
            rows.append((f"channel {name}", ", ".join(f"{v:.4f}" for v in s[name])))
    if manifest.tokenizer:
        rows.append(("tokenizer", manifest.tokenizer["file"]))
    return rows


def summary(manifest: Manifest) -> str:
    """A data set in one line: samples, classes, fields."""
    counts = manifest.statistics.get("labels", {})
    without = [name for i, name in enumerate(manifest.classes) if not counts.get(str(i))]
    classes = "no classes"
    if manifest.classes:
        classes = f"{len(manifest.classes):,} classes ({shown(manifest.classes)})"
    if manifest.classes and without:
        classes += f", {len(without):,} of them without samples ({shown(without)})"
    fields = ", ".join(f"{name} ({', '.join(extensions)})" for name, extensions in manifest.fields.items())
    shards = f"{manifest.samples:,} samples in {len(manifest.shards):,} shards"
    return f"{manifest.root}: {shards}; {classes}; fields {fields}"


def write_sheet(picture: Image.Image, page: str, out: str) -> None:
    """Write a contact sheet as ``out.png`` and ``out.html``, on this machine or behind a URL."""
    folder, slash, name = out.rpartition("/")
    target = io.BytesIO()
    picture.save(target, "PNG")
    store = open_store(folder + slash if slash else ".")
    try:
        store.write(f"{name}.png", target.getvalue())
        store.write(f"{name}.html", page.encode("utf-8", "replace"))
    finally:
        store.close()


class Tile(NamedTuple):
    """A sample to be shown."""

    key: str
    picture: Image.Image | None
    text: str
    """Class and caption, or why there is no picture."""


def sheet(folder: str, count: int) -> tuple[Image.Image, str]:
    """A contact sheet of evenly spaced samples: as a picture, and as a page of HTML that needs no other file.

    Raises:
        DataError: no manifest or index.
    """
    store = open_store(folder)
    try:
        manifest = read_manifest(store)
        count = min(count, manifest.samples)
        tiles = list(_tiles(store, manifest, [i * manifest.samples // count for i in range(count)]))
        return _picture(tiles), _page(manifest, tiles)
    finally:
        store.close()


def _tiles(store: Store, manifest: Manifest, rows: list[int]) -> Iterator[Tile]:
    for item in items(store, manifest, ("image", "caption", "label"), rows):
        label = item.fields.get("label", b"").decode("utf-8", "replace").strip()
        number = label_number(item.fields.get("label", b""))
        if number is not None and number < len(manifest.classes):
            label = manifest.classes[number]
        caption = shortened(item.fields.get("caption", b"").decode("utf-8", "replace"), SHOWN)
        text = "\n".join(t for t in (label, caption) if t)
        picture = None
        try:
            picture = images.decode(item.fields.get("image", b""))[0].pixels.convert("RGB")
            picture = picture.resize([side * max(1, TILE // max(picture.size)) for side in picture.size], 0)
            picture.thumbnail((TILE, TILE))
        except Rejected as reason:
            text = f"{reason}\n{text}"
        yield Tile(item.key, picture, text)


def _picture(tiles: list[Tile]) -> Image.Image:
    import matplotlib  # for its typeface: Pillow's own has no letters but those of ASCII

    columns = max(1, round((len(tiles) * 1.5) ** 0.5))
    lines = -(-len(tiles) // columns)
    w, h = TILE + MARGIN, TILE + MARGIN + 2 * LINE
    canvas = Image.new("RGB", (columns * w + MARGIN, lines * h + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 10)
    for i, tile in enumerate(tiles):
        x, y = MARGIN + i % columns * w, MARGIN + i // columns * h
        if tile.picture is not None:
            canvas.paste(tile.picture, (x + (TILE - tile.picture.width) // 2, y + (TILE - tile.picture.height) // 2))
        else:
            draw.rectangle((x, y, x + TILE - 1, y + TILE - 1), outline="red")
        for j, line in enumerate(tile.text.splitlines()[:2]):
            draw.text((x, y + TILE + j * LINE), _fitting(line, font), "black", font)
    return canvas


def _fitting(text: str, font: Any) -> str:
    if len(text) <= TILE and font.getlength(text) <= TILE:
        return text
    text = text[:TILE]  # of letters that are a pixel wide so many fit
    while text and font.getlength(text + "...") > TILE:
        text = text[:-1]
    return text + "..."


def _page(manifest: Manifest, tiles: list[Tile]) -> str:
    rows = "".join(f"<tr><th>{html.escape(n)}</th><td>{html.escape(v)}</td></tr>" for n, v in table(manifest))
    figures = "".join(_figure(tile) for tile in tiles)
    style = (
        "body{font:14px sans-serif;margin:2em}th{text-align:left;padding-right:1em}figure{display:inline-block;"
        f"width:{TILE}px;margin:8px;vertical-align:top}}figcaption{{font-size:11px;overflow-wrap:anywhere}}"
    )
    return (
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(manifest.root)}</title><style>{style}</style>'
        f"<table>{rows}</table>{figures}\n"
    )


def _figure(tile: Tile) -> str:
    picture = ""
    if tile.picture is not None:
        target = io.BytesIO()
        tile.picture.save(target, "PNG")
        picture = f'<img src="data:image/png;base64,{base64.b64encode(target.getvalue()).decode()}">'
    text = html.escape(tile.text).replace("\n", "<br>")
    return f'<figure title="{html.escape(tile.key)}">{picture}<figcaption>{text}</figcaption></figure>'
