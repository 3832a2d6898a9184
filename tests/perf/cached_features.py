"""A suite on ViT-S at 224: a first run, a second one over the features that the first has kept, and one more with its
records there. Whole commands, from their start to their end: importing PyTorch is part of it.

Run: ``python -m tests.perf.cached_features [--train 2000] [--val 500] [--rounds 3]``; the first run is made once.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from tests.perf.stream_corpus import jpeg, shards

ROOT = Path(__file__).parents[2]
SUITE = """
batch = 64
workers = 1
[streams]
train = "{folder}/train"
val = "{folder}/val"
[image]
size = 224
[[evals]]
name = "knn"
k = [10, 20]
[[evals]]
name = "rank"
"""


def evaluate(folder: Path, out: str) -> tuple[float, float]:
    """Seconds by the clock, and of the processor, of one command."""
    command = ["-m", "launch", "eval", "random:vit_small_patch16_224", str(folder / "suite.toml")]
    return python([*command, "--out", str(folder / out)], {"SLUICE_CACHE": str(folder / "cache")})


def python(words: Sequence[str], environment: Mapping[str, str] = MappingProxyType({})) -> tuple[float, float]:
    """The same of any interpreter."""
    used, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    own = os.environ | environment
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=own, capture_output=True, check=False)
    took, now = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stderr.decode())
    return took, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


def main() -> None:
    """Print seconds, and their part of the first run's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--val", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        contents = [jpeg(number) for number in range(64)]  # the same ones again and again: nothing looks at that
        for stream, count in (("train", args.train), ("val", args.val)):
            (folder / stream).mkdir()
            shards(folder / stream, [contents[i % len(contents)] for i in range(count)], 250)
        (folder / "suite.toml").write_text(SUITE.format(folder=folder))
        first = evaluate(folder, "first")
        print(f"first run, {args.train + args.val} images: {first[0]:.1f} s, {first[1]:.1f} of the processor")
        ways = {"features kept": "again-{}", "records there": "first"}
        found = {way: [evaluate(folder, out.format(n)) for n in range(args.rounds)] for way, out in ways.items()}
        bare = [python(["-c", "import torch, timm"]) for _ in range(args.rounds)]
        for way, runs in (found | {"python -c 'import torch, timm'": bare}).items():
            clock, used = (statistics.median(column) for column in zip(*runs, strict=True))
            print(f"{way}: {clock:.1f} s, {used:.1f}: {clock / first[0]:.3f} and {used / first[1]:.3f} of the first")


if __name__ == "__main__":
    main()
