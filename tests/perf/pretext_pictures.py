"""What each pretext sees, asks and answers: the last showcases of the runs of a sweep, a few methods to a picture.

Run: ``python -m tests.perf.pretext_pictures runs/pretext/table [--seed 0] [--out configs/pretext]``; the samples of
generative models: ``runs/generative/table --out configs/generative``. Rows that the sweep has not got are passed over.
Pictures have 64 colours, so that they stay small.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

GROUPS = {
    "transformations": ("rotation", "relative_patch", "jigsaw", "exemplar"),
    "restoration": ("colorization", "split_brain", "autoencoder", "denoising", "mae", "ijepa", "ddpm"),
    "clusters": ("deep_cluster", "swav", "daic", "dino"),
    "views": ("simclr", "moco", "byol", "barlow_twins", "vicreg", "clip"),
}
"""Name of a picture, and rows of the sweep that it shows."""
SAMPLES = {"samples": ("vae", "codes_prior", "flow", "pixelcnn", "gan", "ddpm", "flow_matching")}
"""The same of configs/generative/table.toml."""
WIDTH, GAP, LETTER, COLOURS, LIMIT = 640, 12, 13, 64, 150_000
"""Pixels of a column, between pictures and of a letter; colours; bytes of a file at most."""
SMALL = 320
"""Pictures that are narrower are shown twice as large."""
NAMED = (150, 0, 90)
"""Colour of a method's name."""


def main() -> None:
    """Write the pictures, and say what they show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("configs/pretext"))
    args = parser.parse_args()
    for group, rows in (SAMPLES if "generative" in args.out.parts else GROUPS).items():
        cells = [cell for row in rows if (cell := shown(args.runs / f"{row},seed={args.seed}", row)) is not None]
        if not cells:
            continue
        path = args.out / f"{group}.png"
        columns(cells).quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
        size = path.stat().st_size
        print(f"{path}: {len(cells)} of {len(rows)} methods, {size} bytes")
        if size > LIMIT:
            raise SystemExit(f"{path} has {size} bytes, more than {LIMIT}: take fewer colours, or fewer rows")


def shown(run: Path, title: str) -> Image.Image | None:
    """The first picture of a run's newest showcase, under the run's name and its caption; None: there is none."""
    folders = sorted(run.glob("showcase/step-*"))
    if not folders:
        return None
    captions: dict[str, str] = json.loads((folders[-1] / "index.json").read_text())
    name, caption = next(((n, c) for n, c in captions.items() if n == "samples"), next(iter(captions.items())))
    picture = Image.open(folders[-1] / f"{name}.png").convert("RGB")
    if picture.width < SMALL:
        picture = picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)
    font, lines = ImageFont.load_default(LETTER), [title, *textwrap.wrap(caption, WIDTH // (LETTER // 2))]
    above = len(lines) * (LETTER + 4) + GAP
    cell = Image.new("RGB", (WIDTH, above + picture.height + GAP), "white")
    draw = ImageDraw.Draw(cell)
    for number, line in enumerate(lines):
        draw.text((0, number * (LETTER + 4)), line, "black" if number else NAMED, font)
    cell.paste(picture, (0, above))  # what is wider than a column is cut off
    return cell


def columns(cells: list[Image.Image]) -> Image.Image:
    """Cells in two columns, each below the shorter one."""
    places: list[tuple[int, int]] = []
    heights = [GAP, GAP]
    for cell in cells:
        column = heights.index(min(heights))
        places.append((GAP + column * (WIDTH + GAP), heights[column]))
        heights[column] += cell.height
    canvas = Image.new("RGB", (2 * (WIDTH + GAP) + GAP, max(heights)), "white")
    for cell, place in zip(cells, places, strict=True):
        canvas.paste(cell, place)
    return canvas


if __name__ == "__main__":
    main()
