"""Themes of icons as domains: a folder for each theme, in it one for each name that all have, in it the drawings.

``sluice prep build folder OUT/THEME ...`` takes them. A name counts where every theme has so many different drawings of
it (other sizes are drawn anew, or scaled). Nothing is kept in the project; packages: :mod:`tests.perf.icons`.

Run: ``python -m tests.perf.icon_domains OUT [--themes Papirus oxygen] [--least 6] [--names 80] [--size 32]``
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from tests.perf.icons import ROOT, THEMES, Icon, draw, drawings

Drawn = dict[str, list[np.ndarray]]


def drawn(icons: list[Icon], size: int) -> list[np.ndarray]:
    """Different drawings alone, uint8[3,size,size], in the order of the files."""
    with ThreadPoolExecutor(2) as pool:
        images = [image for image in pool.map(lambda icon: draw(icon, size), icons) if image is not None]
    return list({image.tobytes(): image for image in images}.values())


def domains(themes: list[str], least: int, names: int, size: int) -> dict[str, Drawn]:
    """Of each theme the drawings of the names that all have ``least`` of: at most so many, spread over the alphabet."""
    listed: dict[str, dict[str, list[Icon]]] = {}
    for theme in themes:
        listed[theme] = defaultdict(list)
        for icon in drawings(theme):
            listed[theme][icon.name].append(icon)
    shared = sorted(set.intersection(*(set(files) for files in listed.values())))
    shared = [name for name in shared if all(len(files[name]) >= least for files in listed.values())]
    found = {theme: {name: drawn(files[name], size) for name in shared} for theme, files in listed.items()}
    kept = [name for name in shared if all(len(images[name]) >= least for images in found.values())]
    kept = [kept[i * len(kept) // min(names, len(kept))] for i in range(min(names, len(kept)))]
    return {theme: {name: images[name] for name in kept} for theme, images in found.items()}


def main() -> int:
    """Write the folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--themes", nargs="+", default=["Papirus", "oxygen"], choices=THEMES)
    parser.add_argument("--least", type=int, default=6, help="different drawings of a name in every theme")
    parser.add_argument("--names", type=int, default=80, help="at most so many classes")
    parser.add_argument("--size", type=int, default=32, help="pixels of the side")
    args = parser.parse_args()
    lacking = [theme for theme in args.themes if not (ROOT / theme).is_dir()]
    if lacking:
        print(f"{ROOT / lacking[0]} is not there; see tests/perf/icons.py for the packages", file=sys.stderr)
        return 2
    for theme, drawn_of in domains(args.themes, args.least, args.names, args.size).items():
        for name, images in drawn_of.items():
            folder = args.out / theme.lower() / name.replace(" ", "-")
            folder.mkdir(parents=True, exist_ok=True)
            for number, image in enumerate(images):
                Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{number:02d}.png")
        print(f"{args.out / theme.lower()}: {sum(map(len, drawn_of.values()))} drawings of {len(drawn_of)} names")
    return 0


if __name__ == "__main__":
    sys.exit(main())
