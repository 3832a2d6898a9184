"""What is seen of long work: lines without a terminal, a bar with one."""

import os
import pty
import re
import subprocess
import sys
import time

import pytest

from data_prep import progress
from data_prep.build import Counts
from data_prep.progress import Progress, waiting
from data_prep.sources.table import Columns, TableSource
from tests.unit.data_prep.test_table import write


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_without_a_terminal(clock, capsys):
    with Progress("building", 10_000) as shown:
        for second in range(1, 101):
            clock[0] += 1
            shown.counts(Counts(inputs=1000 + 50 * second, samples=0, rejects=second, resumed=1000))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "building: 2,500 inputs, 50/s, 30 rejected, 0:02:30 left",
        "building: 4,000 inputs, 50/s, 60 rejected, 0:02:00 left",
        "building: 5,500 inputs, 50/s, 90 rejected, 0:01:30 left",
    ]


def test_a_total_that_comes_late_or_never(clock, capsys):
    with Progress("indexing", None, "tars") as shown:
        clock[0] += 31
        shown.update(31)
        clock[0] += 31
        shown.of(62, 124)
        clock[0] += 31
        shown.of(93, 90)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "indexing: 31 tars, 1/s",
        "indexing: 62 tars, 1/s, 0:01:02 left",
        "indexing: 93 tars, 1/s, 0:00:00 left",
    ]


def test_waiting_says_for_how_long(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.01)
    with waiting("listing"):
        time.sleep(0.1)
    assert capsys.readouterr().err.splitlines()[0] == "listing: 0:00:00 so far"


SHOW = """
import time
from data_prep.build import Counts
from data_prep.progress import Progress
with Progress("building", 40) as progress:
    for i in range(1, 41):
        time.sleep(0.02)
        progress.counts(Counts(inputs=i, rejects=i // 10))
"""


def test_a_bar_with_a_terminal(tmp_path):
    outer, inner = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "150"}
    subprocess.run([sys.executable, "-c", SHOW], stderr=inner, env=environment, check=True, timeout=60)
    os.close(inner)
    seen = b""
    try:
        while piece := os.read(outer, 65536):
            seen += piece
    except OSError:  # how Linux ends a terminal's output
        pass
    finally:
        os.close(outer)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    last = [line for line in re.split("[\r\n]+", text) if "building" in line][-1]
    assert re.search(r"100% 40 inputs, \d+/s, 4 rejected 0:00:0\d 0:00:00", last), text


@pytest.mark.parametrize(("name", "exact"), [("t.parquet", True), ("t.csv", False), ("t.jsonl", False)])
def test_rows_are_counted_beforehand(tmp_path, name, exact):
    rows = [{"file": f"{i:06d}.png", "text": "x" * 20, "kind": str(i % 3)} for i in range(40_000)]
    write(tmp_path / name, rows) if not exact else _parquet(tmp_path / name, rows)
    total = TableSource([tmp_path / name], Columns("file")).total
    assert total == 40_000 if exact else abs(total - 40_000) < 400
    if not exact:
        assert TableSource([tmp_path / name], Columns("file", label="kind")).total == 40_000


def _parquet(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def test_compressed_rows_are_not(tmp_path):
    write(tmp_path / "t.csv.gz", [{"file": "a.png"}])
    assert TableSource([tmp_path / "t.csv.gz"], Columns("file")).total is None
