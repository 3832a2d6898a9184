"""Memory stays within its budget, whatever the samples."""

import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.schema import Beside, Data, Image, Source
from pipeline.core import image as rules
from pipeline.core.manifest import load
from pipeline.data.assemble import Assembler
from pipeline.data.decode import open_image
from pipeline.data.reading import EvalReading
from pipeline.data.stream import open_stream
from pipeline.data.workers import Workers
from tests.unit.data.shards import encode, members, picture, write_data
from tests.unit.data.test_workers import started

MB = 10**6


@pytest.mark.parametrize(("size", "count"), [(2_000, 400), (2 * MB, 24)])
def test_a_micro_batch_is_read_within_the_budget(tmp_path, size, count):
    """Twenty-four samples of 2 MB are 48 MB; with read_mb = 4, a worker holds no more than about twice that."""

    def make(number):
        parts = members(number)
        # Pillow stops at the end of the picture, so what follows only makes the file large.
        return parts | {"png": parts["png"].ljust(size, b"\0")}

    manifest = write_data(tmp_path, [count // 2, count // 2], make)
    data = Data(train=manifest.root, fields=("image", "label"), image=Image(size=8, crop="center"), read_mb=4)
    assembler = Assembler(manifest, data, 0, EvalReading(0, count, count))
    arrays = {name: np.empty((count, *c.shape), c.dtype) for name, c in assembler.columns.items()}
    assembler.fill(0, arrays)
    tracemalloc.start()
    filled = assembler.fill(0, arrays)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assembler.close()
    assert filled.samples == count and not filled.bad and arrays["label"].tolist() == [i % 7 for i in range(count)]
    assert held < 9 * MB


@pytest.mark.parametrize("mixed", [True, False], ids=["mixed", "beside"])
def test_several_data_sets_share_the_budget(tmp_path, mixed):
    """Four data sets with samples of 1 MB: a worker holds 4 MB of each in turn only if they do not share."""

    def make(number):
        return {"cls": b"1".ljust(MB)}

    roots = [write_data(tmp_path / str(i), [4], make).root for i in range(4)]
    if mixed:
        several = {"train": tuple(Source(path=root) for root in roots)}
    else:
        beside = {f"other{i}": Beside(path=root, fields=("label",)) for i, root in enumerate(roots[1:])}
        several = {"train": roots[0], "beside": beside}
    data = Data(fields=("label",), workers=0, read_mb=4, **several)
    batch = 16 if mixed else 4
    stream = open_stream(data, load(data.train), seed=1, global_batch=batch, micro_batch=batch, rank=0, world=1)
    tracemalloc.start()
    next(stream.batches(0))
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    stream.close()
    assert held < 9 * MB


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_an_image_too_large_to_decode_is_bad(monkeypatch, kind):
    data = memoryview(bytearray(encode(picture(0, (40, 50)), kind)))
    monkeypatch.setattr(rules, "MAX_PIXELS", 2000)
    assert open_image(data).size == (40, 50)
    monkeypatch.setattr(rules, "MAX_PIXELS", 1999)
    with pytest.raises(ValueError, match="too many pixels: 50 x 40, most is 1,999"):
        open_image(data)


def peak_of_a_worker(folder, size, count):
    """Most megabytes that a loader process has had, over two passes."""

    def make(number):
        parts = members(number)
        return parts | {"png": parts["png"].ljust(size, b"\0")}

    manifest = write_data(folder, [count // 2, count // 2], make)
    data = Data(train=manifest.root, fields=("image", "label"), image=Image(size=8, crop="center"), read_mb=4)
    workers = Workers(Assembler(manifest, data, 0, EvalReading(0, count, count)), 1)
    for _ in range(2):
        assert sum(made.filled.samples for made in workers.batches(0)) == count
    status = Path(f"/proc/{started(workers)[0]}/status").read_text()
    workers.close()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1000


def test_a_loader_process_stays_within_the_budget(tmp_path):
    """A micro-batch of 48 MB costs a process little more than the 4 MB of read_mb and one image."""
    small, large = peak_of_a_worker(tmp_path / "2 kB", 2_000, 24), peak_of_a_worker(tmp_path / "2 MB", 2 * MB, 24)
    assert large - small < 16
