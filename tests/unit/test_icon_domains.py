"""Themes of icons as domains: the names that all of them have, by drawings that differ."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.perf import icons
from tests.perf.icon_domains import domains


@pytest.fixture
def themes(tmp_path, monkeypatch):
    """Each theme's names, with the grey of each drawing; the file's folder is its size."""
    given = {
        "one": {"open": (1, 2, 3), "save": (1, 2, 2), "print": (4, 5, 6), "only-here": (1, 2, 3), "undo": (1, 2, 3)},
        "two": {"open": (7, 8), "save": (7, 8), "print": (7, 8, 9), "undo": (9, 9)},
    }
    for theme, names in given.items():
        for name, greys in names.items():
            for place, grey in enumerate(greys):
                folder = tmp_path / theme / f"{16 * (place + 1)}x" / "actions"
                folder.mkdir(parents=True, exist_ok=True)
                Image.new("RGBA", (4, 4), (20 * grey,) * 3).save(folder / f"{name}.png")
    for size in ("16x", "32x"):
        folder = tmp_path / "two" / size / "actions"
        (folder / "only-here.png").symlink_to(folder / "open.png")
    monkeypatch.setattr(icons, "ROOT", tmp_path)
    return ["one", "two"]


def test_names_are_shared_and_have_enough_drawings_that_differ(themes):
    """ "undo" of the second theme is one drawing twice, and links are none."""
    found = domains(themes, 2, 40, 4)
    assert {theme: {name: len(images) for name, images in names.items()} for theme, names in found.items()} == {
        "one": {"open": 3, "print": 3, "save": 2},
        "two": {"open": 2, "print": 3, "save": 2},
    }
    assert [int(image[0, 0, 0]) for image in found["two"]["print"]] == [140, 160, 180]
    assert all(image.shape == (3, 4, 4) and image.dtype == np.uint8 for image in found["one"]["open"])
    assert list(domains(themes, 3, 40, 4)["one"]) == ["print"]


def test_fewer_names_are_spread_over_the_alphabet(themes):
    assert list(domains(themes, 2, 2, 4)["two"]) == ["open", "print"]
