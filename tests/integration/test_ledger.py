"""The losses of samples: exact, and the same whatever the ranks, and after a kill."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from pipeline.core.manifest import load
from pipeline.record.losses import History
from tests.integration.runs import codes, die_at, metrics, overrides, run

KEEP = ["record.losses='every epoch'", "engine.precision=fp32", "run.length=20ba"]


def test_every_sample_s_last_loss_is_kept(glyphs, tmp_path):
    """Their mean is that of the steps' losses, each sample is there once an epoch, and killed and resumed at another
    world size it is the same."""
    objective, own = "mae", ["engine.name=deepspeed", "engine.zero=1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # One sample a micro-batch here and two there: a loss that is kept for another sample of its micro-batch is seen.
    alone = overrides(whole, glyphs / "train", *KEEP, *own, "engine.micro_batch=1")
    assert codes(run(1, objective, alone)) == [0]
    samples = load(glyphs / "train").samples
    kept = History(whole).losses
    seen = ~np.isnan(kept)
    assert kept.shape[1] == samples and seen.sum() == 20 * 8
    assert seen[:-1].all(), "an epoch that is over has all"
    steps = [line["loss"] for line in metrics(whole).values()]
    assert len(steps) == 20
    assert kept[seen].mean(dtype=np.float64) == pytest.approx(np.mean(steps), rel=1e-6)

    settings = overrides(killed, glyphs / "train", *KEEP, *own)
    assert codes(run(2, objective, settings, hurt=partial(die_at, 8)))[1] == -9
    assert codes(run(1, objective, settings)) == [0]
    np.testing.assert_allclose(History(killed).losses, kept, rtol=2e-5)
