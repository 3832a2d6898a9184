"""Pictures of the pretexts: the newest showcases of a sweep's rows, none of which is forgotten."""

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.perf import pretext_pictures
from tests.records import ROOT

DRAWN = {"random", "random_ones", "random_vit", "random_unet"}
NOT_SHOWN = DRAWN | {"supervised", "simclr_nought", "simclr_other_recipe"}
"""Rows that ask nothing of their own."""


def keep(run: Path, step: int, pictures: dict[str, tuple[int, int, str]]) -> None:
    """A showcase of pictures of one colour: width, height and colour of each."""
    folder = run / "showcase" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "index.json").write_text(json.dumps({name: f"what {name} is" for name in pictures}))
    for name, (width, height, colour) in pictures.items():
        Image.new("RGB", (width, height), colour).save(folder / f"{name}.png")


def pixels(picture: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(picture) == colour).all(axis=2).sum())


def test_every_row_of_the_sweep_that_asks_something_is_in_one_picture():
    rows = [row["name"] for row in tomllib.loads((ROOT / "configs/pretext/table.toml").read_text())["sweep"]["list"]]
    shown = [row for group in pretext_pictures.GROUPS.values() for row in group]
    assert sorted(shown) == sorted(set(rows) - NOT_SHOWN)


def test_the_first_of_the_newest_showcase_is_shown_twice_as_large_where_it_is_small(tmp_path):
    keep(tmp_path / "mae", 10, {"old": (400, 50, "red")})
    keep(tmp_path / "mae", 20, {"small": (100, 30, "lime"), "large": (700, 40, "blue")})
    keep(tmp_path / "clip", 5, {"large": (700, 40, "blue")})
    cells = [pretext_pictures.shown(tmp_path / row, row) for row in ("mae", "clip")]
    for cell, seen, colour in zip(
        cells, (200 * 60, pretext_pictures.WIDTH * 40), ((0, 255, 0), (0, 0, 255)), strict=True
    ):
        assert cell is not None and cell.width == pretext_pictures.WIDTH
        assert pixels(cell, colour) == seen and pixels(cell, (255, 0, 0)) == 0
    assert pretext_pictures.shown(tmp_path / "nothing", "byol") is None


def test_a_picture_of_each_group_is_written_and_none_that_is_too_large(tmp_path, monkeypatch, capsys):
    for row in ("rotation", "jigsaw", "mae"):
        keep(tmp_path / f"{row},seed=1", 5, {"seen": (400, 90, "lime")})
    monkeypatch.setattr("sys.argv", ["pretext_pictures", str(tmp_path), "--seed", "1", "--out", str(tmp_path)])
    pretext_pictures.main()
    assert "transformations.png: 2 of 4 methods" in capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("*.png")} == {"transformations.png", "restoration.png"}
    assert pixels(Image.open(tmp_path / "transformations.png").convert("RGB"), (0, 255, 0)) == 2 * 400 * 90
    monkeypatch.setattr(pretext_pictures, "LIMIT", 100)
    with pytest.raises(SystemExit, match="take fewer colours"):
        pretext_pictures.main()
