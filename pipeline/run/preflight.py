"""Before anything is built: can these nodes train together? A bad one is named, so that the job can go on without it.

Every rank looks at its own device, memory and clock, one of each node at the run folder; all add up numbers whose sum
is known. The first rank judges the reports, writes the figures to ``RUN/preflight.json`` and, where only some nodes
are bad, their names to ``RUN/launch/bad_nodes.json``, which the agent of a SLURM job reads. It prints the figures that
a person wants to see, with the slowest node's name: that a disk or network is slow is no reason not to train.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.config import provenance
from pipeline.core.errors import LaunchError
from pipeline.core.files import replace_file
from pipeline.dist.group import Place, from_first, gather_objects

FILE = "preflight.json"
BAD_NODES = Path("launch", "bad_nodes.json")
"""{node: reason}, added to."""
SKEW_SECONDS = 10.0
"""Clocks that differ by more make nonsense of time limits and of who was heard of last."""
FREE_MEMORY = 0.8
"""Part of a device's memory that must be free: what holds the rest would be in the way."""
WRITE_BYTES = 4 << 20
REDUCE_NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 24}
"""That the ranks add up: enough for the time to be that of the wire, not of the start."""
REDUCTIONS = 3
SPARE_BYTES = 100 << 20
"""That the run folder's disk must have free, and room for one more checkpoint like the newest one."""


@dataclass(frozen=True)
class Report:
    """What one rank has found."""

    node: str
    rank: int
    device: str
    device_gb: float | None = None
    device_free_gb: float | None = None
    memory_gb: float = 0.0
    """That the node can still give."""
    sees_folder: bool = True
    free_bytes: int | None = None
    """On the run folder's disk; None on ranks that are not a node's first."""
    write_mb_per_second: float | None = None
    clock: float = 0.0
    """Seconds since 1970, read right after all ranks had come together."""
    versions: str = ""
    sums_right: bool = True
    computes_right: bool = True
    reduce_gb_per_second: float | None = None


def preflight(folder: Path, place: Place) -> list[str]:
    """Check the nodes of a job. Collective; about a tenth of a second here.

    Args:
        folder: the run's; made if it is not there.
        place: of this rank.

    Returns:
        The node of each rank.

    Raises:
        LaunchError: on every rank; with the bad nodes and what is wrong with them.
    """
    token = folder / f".preflight-{from_first(time.time_ns())}"
    if place.first:
        folder.mkdir(parents=True, exist_ok=True)
        token.touch()
    report = _look(folder, place)
    dist.barrier()
    report = replace(report, clock=time.time(), sees_folder=token.exists())
    right, speed = _reduce(place)
    reports = gather_objects(replace(report, sums_right=right, reduce_gb_per_second=speed))
    bad = judge(reports, _needed(folder))
    if place.first:
        token.unlink()
        facts = {"time": time.time(), "bad": bad, "ranks": [asdict(r) for r in reports]}
        replace_file(folder / FILE, json.dumps(facts, indent=1).encode() + b"\n")
        if 0 < len(bad) < len({r.node for r in reports}):
            _remember(folder / BAD_NODES, bad)
        if not bad:
            print(f"preflight: {summary(reports)}", flush=True)
    from_first(None)  # nobody leaves before the names are written: the job may be ended as soon as one does
    if bad:
        error = LaunchError("preflight: " + "; ".join(f"node {node} {why}" for node, why in sorted(bad.items())))
        error.everywhere = True
        raise error
    return [report.node for report in reports]


def judge(reports: Sequence[Report], needed_bytes: int) -> dict[str, str]:
    """The nodes that cannot take part, and why.

    Args:
        reports: of all ranks.
        needed_bytes: that a node must be able to write.
    """
    usual_device = _usual([r.device for r in reports])
    usual_versions = _usual([r.versions for r in reports])
    usual_clock = statistics.median(r.clock for r in reports)
    bad: dict[str, str] = {}
    for r in reports:
        tests = {
            f"has {r.device} where others have {usual_device}": r.device == usual_device,
            f"has only {r.device_free_gb} of {r.device_gb} GB free on device {r.device}": _mostly_free(r),
            "does not see the run folder; it must be on a file system that all nodes share": r.sees_folder,
            f"has {(r.free_bytes or 0) >> 20} MB left for the run folder, which needs {needed_bytes >> 20} MB": (
                r.free_bytes is None or r.free_bytes >= needed_bytes
            ),
            "cannot write the run folder": r.free_bytes is None or r.write_mb_per_second is not None,
            f"has a clock that is {r.clock - usual_clock:+.0f} s off": abs(r.clock - usual_clock) <= SKEW_SECONDS,
            f"runs {_other(r.versions, usual_versions)}": r.versions == usual_versions,
            "adds up wrongly over the network": r.sums_right,
            f"computes wrongly on rank {r.rank}": r.computes_right,
        }
        for why, sound in tests.items():
            if not sound:
                bad.setdefault(r.node, why)
    return bad


def summary(reports: Sequence[Report]) -> str:
    """The figures of nodes that are sound, in a line."""
    nodes, clocks = {r.node for r in reports}, [r.clock for r in reports]
    parts = [f"{len(nodes)} {'node' if len(nodes) == 1 else 'nodes'}, {len(reports)} x {reports[0].device}"]
    speeds = [(r.write_mb_per_second, r.node, r.free_bytes or 0) for r in reports if r.write_mb_per_second is not None]
    if speeds:
        slowest, node, free = min(speeds)
        who = f" by {node}, the slowest" if len(nodes) > 1 else ""
        parts.append(f"run folder written at {slowest:.3g} MB/s{who}, {free / 1e9:.3g} GB free")
    rates = [r.reduce_gb_per_second for r in reports if r.reduce_gb_per_second is not None]
    if rates:
        parts.append(f"sums over all ranks at {min(rates):.3g} GB/s")
    if len(nodes) > 1:
        parts.append(f"clocks within {max(clocks) - min(clocks):.2f} s")
    return "; ".join(parts)


def node_name() -> str:
    """As SLURM calls this node, or as it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def _look(folder: Path, place: Place) -> Report:
    """What a rank can see by itself."""
    report = Report(
        node=node_name(),
        rank=place.rank,
        device="cpu",
        memory_gb=_memory_gb(),
        versions=", ".join(f"{name} {version}" for name, version in sorted(provenance.versions().items())),
        computes_right=_computes(place.device),
    )
    if place.device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(place.device)
        name = torch.cuda.get_device_name(place.device)
        report = replace(report, device=name, device_gb=_gb(whole), device_free_gb=_gb(free))
    if place.local_rank == 0 and folder.is_dir():
        free_bytes = shutil.disk_usage(folder).free
        report = replace(report, free_bytes=free_bytes, write_mb_per_second=_write_speed(folder, place.rank))
    return report


def _computes(device: torch.device) -> bool:
    """A product of whole numbers, small enough to be exact in any precision: [512,512] x [512,512]."""
    row = (torch.arange(512, device=device) % 8).float()
    product = row.expand(512, 512) @ torch.ones(512, 512, device=device)
    return bool((product == row.sum()).all())


def _write_speed(folder: Path, rank: int) -> float | None:
    """MB/s, to the disk; None when nothing can be written."""
    path = folder / f".preflight-rank-{rank:05d}"
    start = time.perf_counter()
    try:
        with open(path, "wb") as file:
            file.write(os.urandom(WRITE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        return None
    finally:
        with suppress(OSError):  # where it could not be written it cannot be removed
            path.unlink()
    return round(WRITE_BYTES / 1e6 / (time.perf_counter() - start), 1)


def _reduce(place: Place) -> tuple[bool, float | None]:
    """Whether a sum over the ranks is right, and the GB/s at which it was made."""
    if place.world_size == 1:
        return True, None
    numbers = torch.arange(REDUCE_NUMBERS[place.device.type], device=place.device).remainder(64).float()
    expected = numbers * sum(map(weight, range(place.world_size)))
    dist.all_reduce(numbers.new_ones(1))  # the first one makes connections
    right, seconds = True, []
    for _ in range(REDUCTIONS):
        mine = numbers * weight(place.rank)
        _wait_for(place.device)
        start = time.perf_counter()
        dist.all_reduce(mine)
        _wait_for(place.device)
        seconds.append(time.perf_counter() - start)
        right = right and torch.equal(mine, expected)
    moved = 2 * (place.world_size - 1) / place.world_size * numbers.numel() * numbers.element_size()
    return right, round(moved / 1e9 / min(seconds), 3)


def weight(rank: int) -> int:
    """What a rank multiplies its numbers by: so small that the sum over many thousand ranks is exact in fp32."""
    return rank % 8 + 1


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _needed(folder: Path) -> int:
    """Bytes that the next checkpoint may take."""
    newest = max((folder / "checkpoints").glob("step-*"), key=lambda p: p.name, default=None)
    if newest is None:
        return SPARE_BYTES
    return SPARE_BYTES + sum(p.stat().st_size for p in newest.rglob("*") if p.is_file())


def _mostly_free(report: Report) -> bool:
    if report.device_gb is None or report.device_free_gb is None:
        return True
    return report.device_free_gb >= FREE_MEMORY * report.device_gb


def _usual(values: Sequence[str]) -> str:
    return Counter(values).most_common(1)[0][0]


def _other(found: str, usual: str) -> str:
    """Of two lists of versions, what differs."""
    differ = [part for part in found.split(", ") if part not in usual.split(", ")]
    return f"{', '.join(differ) or 'other versions'} where others do not"


def _memory_gb() -> float:
    facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return _gb(int(facts["MemAvailable"].split()[0]) * 1024)


def _gb(count: int) -> float:
    return round(count / 1e9, 2)


def _remember(path: Path, bad: dict[str, str]) -> None:
    path.parent.mkdir(exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {}
    replace_file(path, json.dumps(before | bad, indent=1).encode() + b"\n")
