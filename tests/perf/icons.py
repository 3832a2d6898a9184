"""Real pictures for benchmarks: the icons of Debian's themes, where these are installed.

An icon's context (actions, apps, devices, ...) is its class, and its name the caption: "document open recent". Nothing
is kept in the project: ``apt-get install librsvg2-bin papirus-icon-theme breeze-icon-theme tango-icon-theme
gnome-icon-theme oxygen-icon-theme``. SVG files are drawn; themes that ship drawn pictures alone are read as they are.
"""

from __future__ import annotations

import io
import random
import re
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ROOT = Path("/usr/share/icons")
THEMES = ("Papirus", "Tango", "breeze", "gnome", "oxygen")
CONTEXTS = ("actions", "apps", "categories", "devices", "emblems", "mimetypes", "places", "status")
MOST = 2000
"""Icons that are taken of a theme, drawn with a fixed seed."""


class Icon(NamedTuple):
    """A file of a theme."""

    path: Path
    theme: str
    context: str
    name: str


class Icons(NamedTuple):
    """What is trained on or measured on."""

    image: Tensor
    """uint8[N,3,S,S]."""
    context: Tensor
    """int64[N], index into ``CONTEXTS``."""
    names: list[str]


def drawings(theme: str) -> Iterator[Icon]:
    """All files, several of a name: no links, no symbols of one colour."""
    for path in sorted(path for kind in ("svg", "png") for path in (ROOT / theme).rglob(f"*.{kind}")):
        context = next((part for part in path.relative_to(ROOT / theme).parts if part in CONTEXTS), None)
        name = " ".join(re.split(r"[^a-z0-9]+", path.stem.lower())).strip()
        if context is None or not name or path.is_symlink() or "symbolic" in str(path) or "@" in str(path):
            continue
        yield Icon(path, theme, context, name)


def icons(theme: str) -> Iterator[Icon]:
    """One file of each name and context: that of the size nearest to 48."""
    found: dict[tuple[str, str], tuple[int, Icon]] = {}
    for icon in drawings(theme):
        sizes = re.findall(r"(?<!\d)(\d+)(?!\d)", "/".join(icon.path.relative_to(ROOT / theme).parts[:-1]))
        distance = abs(int(sizes[0]) - 48) if sizes else 0
        key = (icon.context, icon.name)
        if key not in found or distance < found[key][0]:
            found[key] = (distance, icon)
    chosen = [icon for _, (_, icon) in sorted(found.items())]
    yield from random.Random(0).sample(chosen, min(MOST, len(chosen)))


def draw(icon: Icon, size: int) -> np.ndarray | None:
    """uint8[3,size,size] over white; None where the file cannot be drawn."""
    if icon.path.suffix == ".png":
        with Image.open(icon.path) as image:
            return _pixels(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")), size)
    command = ["rsvg-convert", "-w", str(size), "-h", str(size), "-b", "white", str(icon.path)]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        return None
    with Image.open(io.BytesIO(done.stdout)) as image:
        return _pixels(image, size)


def _pixels(image: Image.Image, size: int) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((size, size)), np.uint8).transpose(2, 0, 1)


def load(themes: Sequence[str], size: int, cache: Path) -> Icons:
    """The icons of some themes; what was drawn once is read from ``cache``."""
    images, contexts, names = [], [], []
    for theme in themes:
        file = cache / f"{theme}-{size}.npz"
        if not file.exists():
            listed = list(icons(theme))
            with ThreadPoolExecutor(2) as pool:
                drawn = list(pool.map(lambda icon: draw(icon, size), listed))
            kept = [(icon, image) for icon, image in zip(listed, drawn, strict=True) if image is not None]
            cache.mkdir(parents=True, exist_ok=True)
            np.savez(
                file,
                image=np.stack([image for _, image in kept]),
                context=np.array([CONTEXTS.index(icon.context) for icon, _ in kept]),
                name=np.array([icon.name for icon, _ in kept]),
            )
        with np.load(file) as held:
            images.append(torch.from_numpy(held["image"]))
            contexts.append(torch.from_numpy(held["context"]))
            names += held["name"].tolist()
    return Icons(torch.cat(images), torch.cat(contexts).long(), names)
