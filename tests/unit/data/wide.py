"""A data set with everything that a field can read, and what each field must make of it."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image as PillowImage

from pipeline.config.schema import Captions, Component, Data, Image
from pipeline.core.manifest import Manifest, save
from pipeline.data.outputs import CLASSES, KIND, MADE, MEMBER, Layout, plain
from pipeline.data.selection import Selection, Side
from tests.unit.data.shards import encode, picture, write_data
from tests.unit.data.test_text import tokenizer

FIELDS = {
    "image": ("jpg", "png"),
    "label": ("cls",),
    "caption": ("txt",),
    "1.txt": ("1.txt",),
    "mask.png": ("mask.png",),
    "npy": ("npy",),
    "metadata": ("json",),
}
SETTINGS = {
    "texts": {"count": 3},
    "vector": {"size": 4},
    "metadata": {"columns": ["score", "size.width"]},
    "stored": {"sidecar": "teacher"},
}
"""Of [data.field.NAME], where a field needs some."""


def mask_of(number: int, size: tuple[int, int] = (24, 20)) -> np.ndarray:
    """uint8[h,w]: values that tell samples and pixels apart."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    return ((y * size[1] + x + number) % 251).astype(np.uint8)


def vector_of(number: int) -> np.ndarray:
    return np.array([number, -0.5, 1e-3, number / 7], np.float32)


def npy(array: np.ndarray) -> bytes:
    target = io.BytesIO()
    np.save(target, array)
    return target.getvalue()


def png(values: np.ndarray) -> bytes:
    target = io.BytesIO()
    PillowImage.fromarray(values).save(target, "PNG")
    return target.getvalue()


def table_of(number: int) -> dict:
    return {"score": number / 10, "size": {"width": 20 + number}, "labels": [number % 7, "c6"]}


def members(number: int) -> dict[str, bytes]:
    second = {"1.txt": b"on a red mat"} if number % 2 else {}
    return second | {
        "cls": str(number % 7).encode(),
        "png": encode(picture(number)),
        "txt": b"a cat",
        "mask.png": png(mask_of(number)),
        "npy": npy(vector_of(number)),
        "json": json.dumps(table_of(number)).encode(),
    }


def write_wide(folder: Path, sizes: list[int], make=members) -> Manifest:
    manifest = write_data(folder, sizes, make, FIELDS)
    (folder / "words.json").write_bytes(tokenizer())
    print_of = hashlib.sha256(tokenizer()).hexdigest()
    manifest = replace(manifest, tokenizer={"file": "words.json", "sha256": print_of})
    save(manifest, folder)
    return manifest


STORED = Layout({"features": 3, "logits": 5}, top=2)
AUGMENTATIONS = 2


def outputs_of(number: int) -> dict[str, bytes]:
    """What is stored of a teacher."""
    random = np.random.default_rng(number)
    outputs = {name: random.normal(size=(AUGMENTATIONS, width)) for name, width in STORED.widths.items()}
    rows, top = STORED.pack(outputs, "float32")
    return {f"teacher:{MEMBER}": npy(rows), f"teacher:{CLASSES}": npy(top)}


def with_outputs(manifest: Manifest, data: Data) -> Selection:
    """The data set with stored outputs of the crops that ``data`` asks for."""
    facts = {"augmentations": AUGMENTATIONS, "augmentation_seed": data.augmentation_seed, "image": plain(data.image)}
    facts |= {"outputs": dict(STORED.widths), "top": STORED.top, "captions": None}
    side = Manifest("side", (), {MEMBER: (MEMBER,), CLASSES: (CLASSES,)}, made={MADE: facts})
    numbers = np.arange(manifest.samples)
    fields = manifest.fields | {f"teacher:{name}": names for name, names in side.fields.items()}
    return Selection(
        manifest.root, manifest.shards, fields, manifest.classes, tokenizer=manifest.tokenizer,
        whole=manifest, kept=numbers, sides={"teacher": Side(side, numbers)}, chosen={},
    )  # fmt: skip


def wide_data(manifest: Manifest, fields, settings=None, **more) -> Data:
    """The configuration of such fields."""
    wanted = {name: SETTINGS.get(name, {}) | (settings or {}).get(name, {}) for name in fields}
    own = {name: Component(**({"name": name} | values)) for name, values in wanted.items() if values}
    more = {"image": Image(size=8), "captions": Captions(length=8), "workers": 0} | more
    if any(component.name == KIND for component in own.values()):
        more = {"augmentations": AUGMENTATIONS} | more
    return Data(train=manifest.root, fields=tuple(fields), field=own, **more)
