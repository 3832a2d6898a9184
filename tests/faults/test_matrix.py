"""The matrix itself: every row is kept, however its test ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.faults import matrix

ROOT = Path(__file__).parents[2]
TESTS = """
import pytest

@pytest.mark.fault(9, "NaN on one rank")
def test_survives(fault_row):
    fault_row.case, fault_row.outcome, fault_row.seconds = "ZeRO 2", "exit 70", 1.25

@pytest.mark.fault(3, "kill a node")
@pytest.mark.skip("no SLURM here")
def test_skips(fault_row):
    ...

@pytest.mark.fault(3, "kill a rank")
def test_fails(fault_row):
    fault_row.outcome = "hangs"
    assert False

def test_of_no_row():
    ...
"""


def test_rows_of_tests_that_pass_fail_and_skip(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    kept = tmp_path / "rows" / "faults.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-c", str(ROOT / "pyproject.toml")]
    command += ["--rootdir", str(tmp_path), "--faults", str(kept), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 1, done.stdout.decode() + done.stderr.decode()
    found = [(r.row, r.fault, r.case, r.outcome, r.seconds, r.result) for r in matrix.read(kept)]
    assert found == [
        (3, "kill a node", "", "no SLURM here", None, "skipped"),
        (3, "kill a rank", "", "hangs", None, "failed"),
        (9, "NaN on one rank", "ZeRO 2", "exit 70", 1.25, "passed"),
    ]


def test_a_failed_row_fails_the_matrix(tmp_path, capsys):
    kept = tmp_path / "faults.jsonl"
    matrix.append(kept, matrix.Row(1, "kill", test="a", outcome="goes on", seconds=2.0, result="passed"))
    assert matrix.main([str(kept)]) == 0
    matrix.append(kept, matrix.Row(2, "stop", test="b", result="failed"))
    matrix.append(kept, matrix.Row(1, "kill", test="a", outcome="goes on", seconds=3.0, result="passed"))
    assert matrix.main([str(kept)]) == 1
    printed = capsys.readouterr().out
    assert "| 1 | kill |  | goes on | 3.0 | passed |" in printed
    assert "2 faults: 1 survived, 1 failed, 0 skipped" in printed
