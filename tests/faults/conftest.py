"""Undisturbed runs, to compare with; made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.launched import LONG
from tests.integration.runs import codes, overrides, run

OWN = ["engine.name=accelerate", "engine.precision=fp32", "run.keep=9"]


@pytest.fixture(scope="session")
def whole(glyphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps under Accelerate on two ranks."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert codes(run(2, "supervised", overrides(folder, glyphs / "train", *OWN))) == [0, 0]
    return folder


@pytest.fixture(scope="session")
def long_whole(glyphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `launched` trains it: ZeRO 1 on two ranks."""
    folder = tmp_path_factory.mktemp("runs") / "long"
    assert codes(run(2, "supervised", overrides(folder, glyphs / "train", *LONG))) == [0, 0]
    return folder
