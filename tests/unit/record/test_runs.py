"""Many runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from pipeline.core.errors import DataError
from pipeline.record.runs import config_differences


def with_config(folder: Path, **tables: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(tomli_w.dumps({"run": {"folder": str(folder), "seed": 0}, **tables}))
    return folder


def test_only_settings_that_differ_are_told(tmp_path):
    a = with_config(tmp_path / "a", optimizer={"lr": 1e-3, "betas": [0.9, 0.95]}, objective={"name": "mae"})
    b = with_config(tmp_path / "b", optimizer={"lr": 3e-4, "betas": [0.9, 0.95]}, objective={"name": "mae"})
    c = with_config(tmp_path / "c", optimizer={"lr": 3e-4, "betas": [0.9, 0.99]}, ema={"decay": 0.9})
    assert config_differences([a, b, c]) == {
        "ema.decay": ("absent", "absent", 0.9),
        "objective.name": ("mae", "mae", "absent"),
        "optimizer.betas": ([0.9, 0.95], [0.9, 0.95], [0.9, 0.99]),
        "optimizer.lr": (1e-3, 3e-4, 3e-4),
    }
    assert config_differences([b, a])["optimizer.lr"] == (3e-4, 1e-3)
    assert config_differences([a]) == {} == config_differences([a, a])


def test_kinds_of_values_are_told_apart(tmp_path):
    values = [1, 1.0, True, "1"]
    folders = [with_config(tmp_path / str(n), objective={"x": value}) for n, value in enumerate(values)]
    for n in range(1, 4):
        assert config_differences([folders[0], folders[n]]) == {"objective.x": (1, values[n])}


def test_a_run_without_a_configuration_and_a_damaged_one(tmp_path):
    a = with_config(tmp_path / "a")
    (tmp_path / "b").mkdir()
    assert config_differences([a, tmp_path / "b"]) == {"run.seed": (0, "absent")}
    (tmp_path / "b" / "config.toml").write_text("[run\n")
    with pytest.raises(DataError, match="is damaged"):
        config_differences([a, tmp_path / "b"])
