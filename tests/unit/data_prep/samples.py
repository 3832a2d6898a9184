"""What the tests of data_prep are made from: pictures, folders, sources that live in memory."""

import hashlib
import io
import tarfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from data_prep.record import Inline, Record


def picture(seed: int = 0, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> Image.Image:
    """Smooth noise, so that lossy formats keep it roughly and no two seeds look alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def opened(data: bytes) -> Image.Image:
    """As Pillow reads it."""
    return Image.open(io.BytesIO(data))


def png(seed: int = 0, size: tuple[int, int] = (24, 20)) -> bytes:
    return encoded(picture(seed, size))


@dataclass
class ListSource:
    """Records in memory."""

    records: list[Record]
    classes: tuple[str, ...] = ()
    name: str = "list"
    positional: bool = False

    @property
    def total(self):
        return len(self.records)

    def describe(self):
        return {"kind": self.name}

    def __iter__(self):
        return iter(self.records)


def inline(n: int, **fields) -> list[Record]:
    """``n`` PNGs with stamps, as a table gives them."""
    records = []
    for i in range(n):
        data = png(i)
        records.append(Record(f"{i:04d}", f"id{i}", Inline(data), hashlib.sha256(data).hexdigest(), **fields))
    return records


def tree(folder: Path) -> dict[str, bytes]:
    """All files below ``folder`` and what they hold."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_tar(path: Path, content: dict[str, bytes]) -> None:
    """A tar as Python's own tarfile writes it."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def members(folder: Path) -> dict[str, bytes]:
    """What Python's own tarfile finds in all tars of a folder."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.name not in found
                found[member.name] = tar.extractfile(member).read()
    return found


def stock_reader(folder: Path) -> list[dict]:
    """Every sample that the stock webdataset reads. It leaves its files open."""
    shards = sorted(str(p) for p in folder.glob("*.tar"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        found = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    return found
