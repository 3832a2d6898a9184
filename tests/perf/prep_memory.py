"""Memory of a build from a long table: it must not grow with the rows.

Builds from a CSV of paths with captions and prints the peak memory of the process as the rows go by, and of the largest
that it has started.
Run: ``python -m tests.perf.prep_memory [--rows 1000000] [--workers 0]``. The aim is below 300 MB per process.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from data_prep.build import Counts, build
from data_prep.options import Options
from data_prep.sources.table import Columns, TableSource


def _started_by(pid: int) -> Iterator[int]:
    """Processes below a process."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            yield from (child, *_started_by(child))


def _peak(pid: int) -> float:
    """MB that a process has held at most."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    began = time.perf_counter()

    def report(counts: Counts) -> None:
        if counts.inputs % (args.rows // 8) == 0:
            rate = counts.inputs / (time.perf_counter() - began)
            largest = max(map(_peak, _started_by(os.getpid())), default=0.0)
            print(
                f"{counts.inputs:>10,} rows: peak {_peak(os.getpid()):6.1f} MB, "
                f"largest process below {largest:6.1f} MB, {rate:,.0f} rows/s",
                flush=True,
            )

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Image.new("RGB", (8, 8), "red").save(folder / "a.png")
        with open(folder / "t.csv", "w") as f:
            f.write("file,text,more\n")
            f.writelines(f"a.png,caption number {i},x{i}\n" for i in range(args.rows))
        source = TableSource([folder / "t.csv"], Columns("file", ("text",)))
        build(source, folder / "out", Options(workers=args.workers), progress=report)


if __name__ == "__main__":
    main()
