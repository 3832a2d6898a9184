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
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.core.manifest import Manifest, Shard, ShardIndex, index_bytes, index_name, load_index, save

_SIZES = [(375, 500)] * 6 + [(480, 640)] * 2 + [(500, 375), (768, 1024)]
_FOREIGN = 0.15
"""Cores that others may use during a trial."""
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
        offset, size, crc32 = (np.zeros((len(rows), 2), np.int64) for _ in range(3))
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for row, content in enumerate(rows):
                for column, (extension, data) in enumerate((("jpg", content), ("cls", b"%d" % (row % 10)))):
                    info = tarfile.TarInfo(f"{first + row:08d}.{extension}")
                    info.size = size[row, column] = len(data)
                    offset[row, column], crc32[row, column] = tar.offset + 512, zlib.crc32(data)
                    tar.addfile(info, io.BytesIO(data))
        content = path.read_bytes()
        shard = Shard(path.name, len(rows), len(content), hashlib.sha256(content).hexdigest())
        keys = tuple(f"{first + row:08d}" for row in range(len(rows)))
        index = ShardIndex(keys, offset, size, crc32)
        (folder / index_name(path.name)).write_bytes(index_bytes(index, shard, ["jpg", "cls"]))
        made.append(shard)
    manifest = Manifest(str(folder), tuple(made), dict(FIELDS), tuple("0123456789"))
    save(manifest, folder)
    return manifest


def unchecked(manifest: Manifest, folder: Path) -> Manifest:
    """The same shards with indexes that hold no CRC-32, so that contents are not checked."""
    folder.mkdir()
    for shard in manifest.shards:
        index = replace(load_index(manifest, shard), crc32=None)
        (folder / shard.name).symlink_to(Path(manifest.root) / shard.name)
        (folder / index_name(shard.name)).write_bytes(index_bytes(index, shard, ["jpg", "cls"]))
    return replace(manifest, root=str(folder))


def _own_ticks(pid: int) -> int:
    """Ticks of processor time that a process, and those that it has started, have had."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        started = [Path(f"/proc/{pid}/task/{task}/children").read_text() for task in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return 0  # it has just ended
    return sum(map(int, fields[11:15])) + sum(_own_ticks(int(child)) for part in started for child in part.split())


def own_seconds() -> float:
    """Of processor time that this process, and those that it has started, have had; to a hundredth."""
    return _own_ticks(os.getpid()) / os.sysconf("SC_CLK_TCK")


def _foreign() -> float:
    """Seconds of processor time that others on this machine have had."""
    user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(rest) - _own_ticks(os.getpid())) / os.sysconf("SC_CLK_TCK")


class Timed(NamedTuple):
    """How long something took."""

    seconds: float
    is_clean: bool
    """Others had hardly any of the machine meanwhile."""


def timed(action: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Timed:
    """Do it once."""
    others, begin, start = _foreign(), time.perf_counter(), clock()
    action()
    seconds = clock() - start
    return Timed(seconds, _foreign() - others <= _FOREIGN * (time.perf_counter() - begin))


def compare(
    title: str,
    unit: str,
    count: int,
    ways: dict[str, Callable[[], object]],
    trials: int,
    before: Callable[[], object] = lambda: None,
) -> None:
    """Print the rate of each way, median of trials run in turns, and its ratio to the first one.

    One-core work is timed by this process's CPU time; work in other processes by the wall clock (name the way with a
    trailing "*"); a way may also time itself and return that. Trials that others disturbed by more than 0.15 of a core
    do not count and are run again, four times as many at most. ``before`` is called before each way, untimed.
    """
    clean: list[dict[str, float]] = []
    disturbed: list[dict[str, float]] = []
    while len(clean) < trials + 1 and len(clean) + len(disturbed) < 4 * trials:
        rates: dict[str, float] = {}
        is_clean = True
        for name, way in ways.items():
            before()
            results: list[object] = []
            whole = timed(
                lambda way=way, results=results: results.append(way()),
                time.perf_counter if name.endswith("*") else time.process_time,
            )
            own = results[0] if isinstance(results[0], Timed) else whole
            rates[name] = count / own.seconds
            is_clean &= own.is_clean
        (clean if is_clean else disturbed).append(rates)
    # The first one warms up.
    counted = clean[1:] or disturbed[1:]
    words = f"{len(counted)} clean trials" if clean[1:] else f"NO CLEAN TRIAL, {len(counted)} disturbed ones"
    print(f"\n{title} ({words} in turns, {len(disturbed)} disturbed; ratio: median and range of the trials' own)")
    first = next(iter(ways))
    for name in ways:
        ratios = sorted(rates[name] / rates[first] for rates in counted)
        print(
            f"  {name:42s} {statistics.median(rates[name] for rates in counted):10,.0f} {unit}/s"
            f"   x{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


def trials(description: str | None) -> int:
    """Read --trials, and say on what machine this runs."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--trials", type=int, default=7)
    wanted = parser.parse_args().trials
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    return wanted
