"""A sweep that really trains, killed in the middle: given again, it ends with the table of an undisturbed one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w

from tests.integration.runs import SMOKE, metrics

ROOT = Path(__file__).parents[2]
NAMES = ["lr=0.001,seed=0", "lr=0.001,seed=1"]


def begin(place: Path, glyphs: Path) -> subprocess.Popen[str]:
    values = {
        "base": [str(SMOKE / "mae.toml")],
        "run": {"folder": "runs", "length": "40ba"},
        "data": {"train": str(glyphs / "train")},
        "every": {"log": "1ba", "checkpoint": "5ba", "showcase": "0ba"},
        "sweep": {"grid": {"optimizer.lr": [1e-3]}, "seeds": 2},
    }
    (place / "sweep.toml").write_text(tomli_w.dumps(values))
    command = [sys.executable, "-m", "launch", "sweep", "sweep.toml"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_and_given_again_it_ends_with_the_same_table(glyphs, tmp_path):
    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    for place in (whole, hurt):
        place.mkdir()
    undisturbed = begin(whole, glyphs)
    table = undisturbed.communicate(timeout=280)[0]
    assert undisturbed.returncode == 0
    sweep = begin(hurt, glyphs)
    log = hurt / "runs" / NAMES[1] / "metrics.jsonl"
    deadline = time.monotonic() + 280
    while not log.exists() or len(log.read_text().splitlines()) < 8:
        assert time.monotonic() < deadline and sweep.poll() is None, "the second run did not come to step 8"
        time.sleep(0.02)
    sweep.kill()
    sweep.communicate()
    again = begin(hurt, glyphs)
    # The run's output is that of a person's console; the table is what comes last.
    assert again.communicate(timeout=280)[0].endswith(table[table.index("run  ") :]) and again.returncode == 0
    for name in NAMES:
        assert metrics(hurt / "runs" / name) == metrics(whole / "runs" / name)
    first = (hurt / "runs" / NAMES[0] / "metrics.jsonl").read_text()
    assert '"attempt": 1' not in first and '"attempt": 1' in log.read_text()
