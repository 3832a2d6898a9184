"""The benchmark of pretexts compares with as many images as a step's encoders are given, and its rows can be built."""

import pytest

from pipeline.core import registry
from tests.perf import pretexts


@pytest.mark.parametrize(
    ("row", "images"),
    [("jigsaw", 9), ("autoencoder, contractive", 2), ("moco", 1)],
)
def test_the_bare_pass_is_of_what_trained_encoders_see(row, images, monkeypatch):
    monkeypatch.setattr(pretexts, "SIZE", 48)
    name, settings = pretexts.ROWS[row]
    own = settings | ({"tiles": {"size": 14, "jitter": 2}} if "tiles" in settings else {})
    own |= {"doublings": 3} if name == "autoencoder" else {}
    ticks = iter(range(100))
    crops, alone, whole = pretexts.measured(name, own, 2, 1, lambda: next(ticks))
    assert crops == 2 * images and len(alone) == len(whole) == 1


def test_every_row_has_settings_of_its_objective():
    for name, settings in pretexts.ROWS.values():
        if name in registry.names("pipeline.objectives"):
            registry.module("pipeline.objectives", name).Config(**pretexts.ENCODER | settings)
