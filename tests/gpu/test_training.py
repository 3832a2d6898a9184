"""On an accelerator every objective trains under both engines in bf16, and a run that was stopped goes on as it was.

One process trains all objectives under one engine, one after the other, through the program's own entry.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_prep.tokenizer import train_tokenizer
from pipeline.core import registry
from tests.integration.runs import SMOKE, metrics, overrides

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
]
NAMES = registry.names("pipeline.objectives")
ENGINES = {
    "accelerate": ["engine.name=accelerate"],
    "zero1": ["engine.name=deepspeed", "engine.zero=1"],
    "zero3": ["engine.name=deepspeed", "engine.zero=3"],
}
LENGTH, EVERY = 6, 3
BODY = """
import json, sys
from pipeline.run.__main__ import main
for command in json.load(sys.stdin):
    code = main(command)
    if code:
        sys.exit(f"{command}: exit code {code}")
"""


def train(runs: dict[str, list[str]]) -> None:
    """Train runs, by objective and settings, in one process that has the device to itself."""
    commands = [
        ["train", "--config", str(SMOKE / f"{name}.toml"), *(word for s in settings for word in ("--set", s))]
        for name, settings in runs.items()
    ]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "DS_ACCELERATOR")}
    root = str(SMOKE.parents[1])
    done = subprocess.run(
        [sys.executable, "-c", BODY],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        cwd=root,
        env=environment | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.mark.parametrize("engine", ENGINES)
def test_it_trains_and_resumes(engine, glyphs, tmp_path):
    data = tmp_path / "train"
    shutil.copytree(glyphs / "train", data)
    train_tokenizer(str(data), 300)

    def settings(folder: Path) -> list[str]:
        more = [f"run.length={LENGTH}ba", "engine.micro_batch=8", "engine.precision=bf16", *ENGINES[engine]]
        return overrides(folder, data, *more)

    train({name: settings(tmp_path / name) for name in NAMES})
    straight = {name: metrics(tmp_path / name) for name in NAMES}
    for name, lines in straight.items():
        assert sorted(lines) == list(range(1, LENGTH + 1)), name
        # What came after the first checkpoint is done once more.
        shutil.rmtree(tmp_path / name / "checkpoints" / f"step-{LENGTH:08d}")
        (tmp_path / name / "metrics.jsonl").unlink()
    train({name: settings(tmp_path / name) for name in NAMES})
    for name, lines in straight.items():
        resumed = metrics(tmp_path / name)
        assert sorted(resumed) == list(range(EVERY + 1, LENGTH + 1)), name
        for step, line in resumed.items():
            assert line["data_digest"] == lines[step]["data_digest"], (name, step)
            # Some kernels add in any order; in bf16 that shows in the third digit.
            assert line["loss"] == pytest.approx(lines[step]["loss"], rel=0.02), (name, step)
