"""Re-encoding: workers against one, and resizing against Pillow's best path in one process.

Run: ``python -m tests.perf.prep_encode [--trials 5]``. The workers' ratio needs as many free cores as workers.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from data_prep import images
from data_prep.build import build
from data_prep.options import ImageOptions, Options
from data_prep.sources.folder import FolderSource
from tests.perf.stream_corpus import compare, jpeg, trials

OPTIONS = ImageOptions("jpg", quality=90, resize="short", size=256)


def _pillow(data: bytes) -> bytes:
    """Pillow alone: decoded at a part of the size where that leaves twice the target, averaged, resized, encoded."""
    image = Image.open(io.BytesIO(data))
    w, h = image.size
    scale = 256 / min(w, h)
    target = (round(w * scale), round(h * scale))
    image.draft("RGB", (2 * target[0], 2 * target[1]))
    out = io.BytesIO()
    image.resize(target, Image.Resampling.BICUBIC, reducing_gap=2.0).save(out, "JPEG", quality=90)
    return out.getvalue()


def _build(source: Path, out: Path, workers: int) -> None:
    shutil.rmtree(out, ignore_errors=True)
    build(FolderSource(source), out, Options({}, image=OPTIONS, workers=workers))


def _each(use: Callable[[bytes], object], contents: list[bytes]) -> None:
    """One after the other; nothing is kept, so that memory is used again, as in a build."""
    for content in contents:
        use(content)


def main() -> None:
    wanted = trials(__doc__)
    contents = [jpeg(i) for i in range(48)]
    compare(
        "Short side to 256, one process",
        "images",
        len(contents),
        {
            "Pillow: draft, reduce, resize": lambda: _each(_pillow, contents),
            "ours, checks included": lambda: _each(lambda c: images.store(c, "jpg", OPTIONS), contents),
        },
        wanted,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        for i in range(960):
            (folder / "in" / f"{i:04d}.jpg").write_bytes(contents[i % len(contents)])
        compare(
            "Building 960 photos, short side to 256 (with starting the workers)",
            "images",
            960,
            {f"{n} workers *": lambda n=n: _build(folder / "in", folder / "out", n) for n in (1, 2)},
            wanted,
        )


if __name__ == "__main__":
    main()
