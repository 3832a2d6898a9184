"""The beats of a run say where each rank is, and where it was when it died."""

from __future__ import annotations

import json
from functools import partial

from pipeline.record.beats import read_beats
from tests.integration.runs import codes, die_at, overrides, run


def test_the_step_of_a_death_is_known(glyphs, tmp_path):
    settings = overrides(tmp_path, glyphs / "train", "engine.name=accelerate", "engine.precision=fp32")
    assert codes(run(2, "supervised", settings, hurt=partial(die_at, 5)))[1] == -9
    beats = read_beats(tmp_path)
    assert [(b.rank, b.attempt) for b in beats] == [(0, 0), (1, 0)]
    assert (beats[1].step, beats[1].phase) == (5, "log")
    assert beats[0].step in (5, 6)
    assert json.loads((tmp_path / "preflight.json").read_text())["bad"] == {}  # before the first of them
