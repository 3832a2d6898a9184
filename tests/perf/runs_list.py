"""Seconds that `sluice runs` takes over a folder of a thousand runs, each time in a new process.

Plain, with a condition on a setting and an order by a result (which reads every configuration), with seeds gathered,
and as a page. Run: ``python -m tests.perf.runs_list [--rounds 7] [--runs 1000]``.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.unit.launch.many_runs import make_run

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "sluice --help": ["--help"],
    "sluice runs": ["runs", "."],
    "... --where --sort": ["runs", ".", "--where", "optimizer.lr > 1e-3", "--sort", "knn/top1"],
    "... --seeds": ["runs", ".", "--seeds"],
    "... --html": ["runs", ".", "--html", "index.html"],
}


def seconds(words: Sequence[str], folder: Path) -> tuple[float, float]:
    """Of one command: by the clock from its start to its end, and of the processor."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from launch.cli import main; main()"
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, *words], cwd=folder, check=True, capture_output=True)
    took, now = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


def main() -> None:
    """Print the middle and the range of each command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--runs", type=int, default=1000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for number in range(args.runs):
            lr, ratio = 10.0 ** (-4 + number // 3 % 5 / 2), 0.5 + number // 15 % 4 / 10
            make_run(
                folder / f"group-{number // 60:02d}" / f"lr={lr:.3g},mask={ratio:g},seed={number % 3}",
                lr,
                ratio,
                number % 3,
            )
        for name, words in COMMANDS.items():
            clock, cpu = zip(*(seconds(words, folder) for _ in range(args.rounds)), strict=True)
            spread = f"{min(clock):.2f} to {max(clock):.2f}"
            print(
                f"{name:<20} {statistics.median(clock):.2f} s ({spread}), {statistics.median(cpu):.2f} s of CPU",
                flush=True,
            )


if __name__ == "__main__":
    main()
