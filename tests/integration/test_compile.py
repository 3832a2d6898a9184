"""Compiled blocks train as the plain ones do, through the whole program under both engines."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch

from tests.integration.runs import codes, metrics, overrides, run


def without_code_generator() -> None:
    """Trace and differentiate, but run torch's own kernels: generating others takes a minute."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")  # torch's own, while it traces


def test_compiled_runs_have_the_losses_of_plain_ones(glyphs, tmp_path):
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    quick = ["run.length=3ba", "engine.precision=fp32"]
    assert codes(run(1, "mae", overrides(plain, glyphs / "train", *quick, "engine.name=accelerate"))) == [0]
    settings = overrides(compiled, glyphs / "train", *quick, "objective.compile=true")
    assert codes(run(1, "mae", settings, without_code_generator)) == [0]
    one, other = metrics(plain), metrics(compiled)
    assert one.keys() == other.keys() == {1, 2, 3}
    for step in one:
        assert other[step]["loss"] == pytest.approx(one[step]["loss"], rel=1e-5)
        assert other[step]["data_digest"] == one[step]["data_digest"]
