"""Memory of a build from a long table: it must not grow with the rows.

Builds from a CSV of paths with captions and prints the peak memory of the process as the rows go by.
Run: ``python -m tests.perf.prep_memory [--rows 1000000] [--workers 0]``. The aim is below 300 MB per process.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

from PIL import Image

from data_prep.build import Counts, build
from data_prep.options import Options
from data_prep.sources.table import Columns, TableSource


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    began = time.perf_counter()

    def report(counts: Counts) -> None:
        if counts.inputs % (args.rows // 8) == 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            rate = counts.inputs / (time.perf_counter() - began)
            print(f"{counts.inputs:>10,} rows: peak {peak:6.1f} MB, {rate:,.0f} rows/s", flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Image.new("RGB", (8, 8), "red").save(folder / "a.png")
        with open(folder / "t.csv", "w") as f:
            f.write("file,text,more\n")
            f.writelines(f"a.png,caption number {i},x{i}\n" for i in range(args.rows))
        source = TableSource([folder / "t.csv"], Columns("file", ("text",)))
        build(source, folder / "out", Options(workers=args.workers), progress=report)
        workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(f"largest worker: {workers:.1f} MB" if args.workers else "no workers")


if __name__ == "__main__":
    main()
