"""Photo-like JPEGs and shards for the stream's benchmarks, and fair timing of alternatives.

Sizes follow ImageNet's: 60 % 500x375, 20 % 640x480, 10 % 375x500, 10 % 1024x768, quality 90, 4:2:0.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import platform
import statistics
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.core.manifest import Manifest, Shard, ShardIndex, index_bytes, index_name, save

_SIZES = [(375, 500)] * 6 + [(480, 640)] * 2 + [(500, 375), (768, 1024)]
FIELDS = {"image": ("jpg",), "label": ("cls",)}


def photo(number: int) -> np.ndarray:
    """uint8[h,w,3] with the spectrum of a photograph: noise whose amplitude falls with frequency."""
    rng = np.random.default_rng(number)
    h, w = _SIZES[number % len(_SIZES)]
    fy, fx = np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None, :]
    amplitude = 1 / np.maximum(np.hypot(fy, fx), 1 / max(h, w)) ** 1.2
    grey, *colour = (
        np.fft.irfft2(amplitude * np.exp(2j * np.pi * rng.random(amplitude.shape)), (h, w)) for _ in range(4)
    )
    layers = np.stack([grey + 0.3 * c for c in colour], -1)
    layers = (layers - layers.mean()) / layers.std() * 55 + 120
    return np.clip(layers + rng.normal(0, 4, (h, w, 1)), 0, 255).astype(np.uint8)


def jpeg(number: int) -> bytes:
    """A photograph as a file."""
    target = io.BytesIO()
    Image.fromarray(photo(number)).save(target, "JPEG", quality=90)
    return target.getvalue()


def shards(folder: Path, contents: list[bytes], per_shard: int) -> Manifest:
    """A data set of these image files, with labels."""
    made = []
    for first in range(0, len(contents), per_shard):
        path = folder / f"x-{first // per_shard:06d}.tar"
        rows = contents[first : first + per_shard]
        offset, size = (np.zeros((len(rows), 2), np.int64) for _ in range(2))
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for row, content in enumerate(rows):
                for column, (extension, data) in enumerate((("jpg", content), ("cls", b"%d" % (row % 10)))):
                    info = tarfile.TarInfo(f"{first + row:08d}.{extension}")
                    info.size = size[row, column] = len(data)
                    offset[row, column] = tar.offset + 512
                    tar.addfile(info, io.BytesIO(data))
        content = path.read_bytes()
        shard = Shard(path.name, len(rows), len(content), hashlib.sha256(content).hexdigest())
        keys = tuple(f"{first + row:08d}" for row in range(len(rows)))
        (folder / index_name(path.name)).write_bytes(index_bytes(ShardIndex(keys, offset, size), shard, ["jpg", "cls"]))
        made.append(shard)
    manifest = Manifest(str(folder), tuple(made), dict(FIELDS), tuple("0123456789"))
    save(manifest, folder)
    return manifest


def compare(
    title: str,
    unit: str,
    count: int,
    ways: dict[str, Callable[[], object]],
    trials: int,
    before: Callable[[], object] = lambda: None,
) -> None:
    """Print the rate of each way, median of trials run in turns, and its ratio to the first one.

    One-core work is timed by this process's CPU time, so that other load on the machine counts less; work in other
    processes by the wall clock (name the way with a trailing "*"). ``before`` is called before each, untimed.
    """
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for trial in range(trials + 1):
        for name, way in ways.items():
            before()
            clock = time.perf_counter if name.endswith("*") else time.process_time
            start = clock()
            way()
            if trial:
                rates[name].append(count / (clock() - start))
    first = next(iter(rates.values()))
    print(f"\n{title} ({trials} trials in turns; ratio: median and range of the trials' own)")
    for name, values in rates.items():
        ratios = sorted(v / f for v, f in zip(values, first, strict=True))
        print(
            f"  {name:42s} {statistics.median(values):10,.0f} {unit}/s"
            f"   x{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


def trials(description: str | None) -> int:
    """Read --trials, and say on what machine this runs."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--trials", type=int, default=7)
    wanted = parser.parse_args().trials
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    return wanted
