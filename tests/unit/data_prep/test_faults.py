"""What the system refuses, for real: a full disk, folders that may not be written or read; and memory stays flat."""

import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.build import build
from data_prep.options import Options
from launch.prep import app
from pipeline.core.errors import DataError
from tests.unit.data_prep.samples import ListSource, inline, png, tree

OPTIONS = Options({}, shard_samples=4)
NOBODY = 65534


@contextmanager
def small_disk(folder, kilobytes):
    """A file system of its own; only root may mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(tmp_path):
    build(ListSource(inline(24)), tmp_path / "whole", OPTIONS)
    with small_disk(tmp_path / "disk", 64) as disk:
        with pytest.raises(DataError, match=r"No space left on device.*same command to go on"):
            build(ListSource(inline(24)), disk, OPTIONS)
        done = tree(disk)
        finished = [name for name in done if name.endswith(".tar")]
        whole = tree(tmp_path / "whole")
        assert 0 < len(finished) < 6 and all(done[name] == whole[name] for name in finished)
        assert not [name for name in done if name.endswith((".part", "manifest.json"))]
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        build(ListSource(inline(24)), disk, OPTIONS)
        assert tree(disk) == whole


@pytest.fixture
def without_rights():
    """A folder, and a context in which this process may do no more than anybody."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)

        @contextmanager
        def nobody():
            was = os.geteuid()
            if was == 0:
                os.seteuid(NOBODY)
            try:
                yield
            finally:
                os.seteuid(was)

        yield folder, nobody
        for path in folder.rglob("*"):
            if path.is_dir():
                path.chmod(0o755)


def test_folders_that_may_not_be_written(without_rights):
    folder, nobody = without_rights
    build(ListSource(inline(6)), folder / "out", OPTIONS)
    lines = [["index", str(folder / "out/train")], ["stats", str(folder / "out/train"), "--renew"]]
    for line in lines:  # as root, so that nothing is left to be imported later
        app(line, standalone_mode=False)
    before = tree(folder)
    for path in (folder / "out/train", folder / "out", folder):
        path.chmod(0o555)
    with nobody():
        with pytest.raises(DataError, match="Permission denied"):
            build(ListSource(inline(6)), folder / "new", OPTIONS)
        for line in lines:
            with pytest.raises(DataError, match=r"(index|stats) stopped: .*Permission denied"):
                app(line, standalone_mode=False)
    assert tree(folder) == before


def test_files_that_may_not_be_read(without_rights):
    folder, nobody = without_rights
    for i in range(9):
        (folder / f"in/{'ab'[i % 2]}").mkdir(parents=True, exist_ok=True)
        (folder / f"in/{'ab'[i % 2]}/{i}.png").write_bytes(png(i))
    (folder / "w").mkdir()
    (folder / "w").chmod(0o777)
    secret = folder / "in/a/4.png"
    command = ["build", "folder", str(folder / "in"), str(folder / "w/out"), "--shard-samples", "2"]
    with nobody():
        secret_mode = secret.stat().st_mode
    secret.chmod(0)
    with nobody(), pytest.raises(DataError, match=r"Permission denied.*4\.png.*same command to go on"):
        app(command, standalone_mode=False)
    secret.chmod(secret_mode)
    with nobody():
        app(command, standalone_mode=False)
    app(["build", "folder", str(folder / "in"), str(folder / "w/whole"), "--shard-samples", "2"], standalone_mode=False)
    assert tree(folder / "w/out/train") == tree(folder / "w/whole/train")
    (folder / "in/b").chmod(0)
    with nobody(), pytest.raises(DataError, match=r"the source cannot be read.*Permission denied"):
        app(command, standalone_mode=False)


LONG = """
import sys
from data_prep.build import build
from data_prep.options import Options
from data_prep.sources.table import Columns, TableSource
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
import pyarrow.parquet
folder, name = sys.argv[1:]
before = peak()
build(TableSource([folder + "/" + name], Columns("file", ("text",))), folder + "/out", Options(shard_samples=50))
print(before, peak())
"""


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_memory_does_not_grow_with_the_table(tmp_path, name):
    """Most rows are rejected, which is cheap, and as much work for the table's reader as a sample would be."""
    (tmp_path / "a.png").write_bytes(png(0, (8, 8)))
    files = ["a.png" if i % 20 == 0 else "no.png" for i in range(4000)]
    texts = [f"{i} {'caption ' * 3000}" for i in range(4000)]
    if name == "t.csv":
        with open(tmp_path / name, "w") as f:
            f.writelines(["file,text\n", *(f"{file},{text}\n" for file, text in zip(files, texts, strict=True))])
    else:  # one row group, as large as the table
        options = {"row_group_size": 4000, "use_dictionary": False, "compression": "none", "write_batch_size": 32}
        pq.write_table(pa.table({"file": files, "text": texts}), tmp_path / name, **options)
    done = subprocess.run([sys.executable, "-c", LONG, tmp_path, name], capture_output=True, text=True, check=True)
    before, peak = (float(word) for word in done.stdout.split())
    assert peak < 300 and peak - before < 48, "MB; the table has 96"
