"""Small data sets for tests: plain tars with a manifest and indexes."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.core.manifest import (
    Manifest,
    Shard,
    ShardIndex,
    index_bytes,
    index_name,
    save,
)

FIELDS = {"image": ("jpg", "png"), "label": ("cls",)}


def picture(number: int, size: tuple[int, int] = (24, 20)) -> np.ndarray:
    """uint8[h,w,3]: smooth colours that tell samples apart."""
    h, w = size
    y, x = np.mgrid[0:h, 0:w]
    red = (number * 37 + 4 * x) % 256
    return np.stack([red, (number * 11 + 6 * y) % 256, (x * y + number) % 256], -1).astype(np.uint8)


def encode(pixels: np.ndarray, kind: str = "png") -> bytes:
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, {"png": "PNG", "jpg": "JPEG"}[kind])
    return target.getvalue()


def members(number: int) -> dict[str, bytes]:
    """Extension to content of a sample; its id is its label modulo 7 and decides its picture."""
    return {"cls": str(number % 7).encode(), "png": encode(picture(number))}


def write_shard(path: Path, samples: list[tuple[str, dict[str, bytes]]], fields=FIELDS) -> Shard:
    """One tar with its index."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, parts in samples:
            for extension, content in parts.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    keys = [key for key, _ in samples]
    names = [extension for known in fields.values() for extension in known]
    offset, size, crc32 = (np.full((len(keys), len(names)), -1, np.int64) for _ in range(3))
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        for info in tar:
            key, _, extension = info.name.partition(".")
            if extension in names:
                place = keys.index(key), names.index(extension)
                offset[place], size[place] = info.offset_data, info.size
                crc32[place] = zlib.crc32(content[info.offset_data : info.offset_data + info.size])
    shard = Shard(path.name, len(samples), len(content), hashlib.sha256(content).hexdigest())
    index = ShardIndex(tuple(keys), offset, size, crc32)
    (path.parent / index_name(path.name)).write_bytes(index_bytes(index, shard, names))
    return shard


def write_data(folder: Path, sizes: list[int], make=members, fields=FIELDS) -> Manifest:
    """A data set of shards with these numbers of samples."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, number = [], 0
    for i, size in enumerate(sizes):
        samples = [(f"{number + j:06d}", make(number + j)) for j in range(size)]
        shards.append(write_shard(folder / f"x-{i:06d}.tar", samples, fields))
        number += size
    manifest = Manifest(str(folder), tuple(shards), dict(fields), tuple(f"c{i}" for i in range(7)))
    save(manifest, folder)
    return manifest
