"""Showcase pictures: ``showcase/step-00001234/NAME.png`` and, written last, ``index.json`` with the captions."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.files import replace_file
from pipeline.record.files import dumps
from pipeline.record.pictures import Shown, png

if TYPE_CHECKING:
    from pipeline.core.protocols import Picture

FOLDER = "showcase"
_INDEX = "index.json"


def save_pictures(folder: str | os.PathLike[str], step: int, pictures: Mapping[str, Picture]) -> None:
    """Save the pictures of one step. Saving the same step again, after a resume, replaces them."""
    here = Path(folder) / FOLDER / f"step-{step:08d}"
    here.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        assert re.fullmatch(r"\w[\w.-]*", name), f"{name!r} cannot be a file's name"
        replace_file(here / f"{name}.png", png(picture.image))
    captions = {name: picture.caption for name, picture in pictures.items()}
    replace_file(here / _INDEX, dumps(captions, indent=1).encode())


def read_pictures(folder: str | os.PathLike[str]) -> dict[int, list[Shown]]:
    """Step to its pictures, by step. A step whose index was not yet written is left out."""
    found = {}
    for index in sorted((Path(folder) / FOLDER).glob(f"step-*/{_INDEX}")):
        captions = json.loads(index.read_text(encoding="utf-8"))
        step = int(index.parent.name.removeprefix("step-"))
        found[step] = [Shown(name, index.parent / f"{name}.png", caption) for name, caption in captions.items()]
    return dict(sorted(found.items()))
