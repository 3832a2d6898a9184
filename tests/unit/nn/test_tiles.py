"""Tiles: their places, and that neither lines across borders nor the fringes of lenses give the places away."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from pipeline.core.errors import ConfigError
from pipeline.core.random import SampleRandom
from pipeline.nn.permutations import distant_permutations
from pipeline.nn.tiles import TILES, Tiling, close_shortcuts, cut_tiles, some_grey

STD = torch.tensor([0.2, 0.3, 0.4])[:, None, None]


def random(count: int, purpose: str = "tiles") -> SampleRandom:
    return SampleRandom(1, purpose, torch.zeros(count, dtype=torch.int64), torch.arange(count))


def places(count: int, height: int, width: int, channels: int = 1) -> torch.Tensor:
    """Each pixel holds its own number."""
    return torch.arange(height * width).view(1, 1, height, width).expand(count, channels, -1, -1)


@pytest.mark.parametrize(("height", "width", "size"), [(30, 30, 10), (31, 35, 8), (48, 30, 7)])
def test_without_jitter_tiles_lie_in_the_middle_of_their_cells(height, width, size):
    image = places(2, height, width)
    tiles = cut_tiles(image, random(2), Tiling(size=size))
    assert tiles.shape == (2, TILES, 1, size, size)
    rows, columns = height // 3, width // 3
    for tile, (row, column) in enumerate(product(range(3), range(3))):
        top = (height - 3 * rows) // 2 + row * rows + (rows - size) // 2
        left = (width - 3 * columns) // 2 + column * columns + (columns - size) // 2
        assert torch.equal(tiles[1, tile], image[1, :, top : top + size, left : left + size])


def test_jitter_reaches_all_of_its_range_and_never_leaves_the_cell():
    corners = cut_tiles(places(500, 36, 36), random(500), Tiling(size=8, jitter=3))[..., 0, 0].squeeze(2)
    rows, columns = corners // 36 - 12 * (torch.arange(9) // 3), corners % 36 - 12 * (torch.arange(9) % 3)
    for found in (rows, columns):
        assert all(set(found[:, tile].tolist()) == {0, 1, 2, 3} for tile in range(9))
    assert (
        abs(np.corrcoef(rows[:, 0], columns[:, 0])[0, 1]) < 0.2 and abs(np.corrcoef(rows[:, 0], rows[:, 1])[0, 1]) < 0.2
    )


def test_tiles_belong_to_the_sample_and_not_to_its_place_in_the_batch():
    tiling, image = Tiling(size=6, jitter=4, shift=1), places(4, 33, 33, 3)
    tiles = cut_tiles(image, random(4), tiling)
    own = SampleRandom(1, "tiles", torch.zeros(1, dtype=torch.int64), torch.tensor([2]))
    assert torch.equal(cut_tiles(image[2:3], own, tiling)[0], tiles[2])
    assert not torch.equal(tiles[0], tiles[1])


def test_channels_are_shifted_each_by_itself():
    tiles = cut_tiles(places(200, 36, 36, 3), random(200), Tiling(size=6, shift=2))
    corners = tiles[..., 0, 0] - (3 * 37 + 12 * (36 * (torch.arange(9) // 3) + torch.arange(9) % 3))[:, None]
    rows, columns = (corners + 36 * 18 + 18) // 36 - 18, (corners + 18) % 36 - 18
    for found in (rows, columns):
        assert set(found.flatten().tolist()) == {-2, -1, 0, 1, 2}
        assert 0.6 < float((found[:, :, 0] != found[:, :, 1]).float().mean()) < 0.95
    assert tiles.min() >= 0 and tiles.max() < 36 * 36


def test_dropping_leaves_one_channel_as_it_was_and_noise_for_the_others():
    tiles = torch.randn(64, TILES, 3, 5, 5, generator=torch.manual_seed(0))
    dropped = close_shortcuts(tiles, random(64), Tiling(size=5, colour="drop"), STD)
    same = (dropped == tiles).all(dim=(3, 4))
    assert (same.sum(dim=2) == 1).all()
    assert all(0.25 < float(same[:, :, c].float().mean()) < 0.42 for c in range(3))
    kept = same.int().argmax(dim=2)  # of each tile by itself
    assert 0.55 < float((kept[:, 1:] != kept[:, :-1]).float().mean()) < 0.78
    noise = dropped[~same]
    assert 0.009 < float(noise.std()) < 0.011 and abs(float(noise.mean())) < 0.001


def test_projection_is_that_of_the_paper():
    """B = I - a^T a / (a a^T), a = [-1, 2, -1], on colours that have their mean taken away, but no other scale."""
    tiles = torch.randn(2, TILES, 3, 4, 4, generator=torch.manual_seed(0))
    found = close_shortcuts(tiles, random(2), Tiling(size=4, colour="project"), STD)
    a = np.array([[-1.0, 2.0, -1.0]])
    matrix = np.eye(3) - a.T @ a / (a @ a.T)
    plain = (tiles * STD).permute(0, 1, 3, 4, 2).double().numpy()
    expected = torch.from_numpy(plain @ matrix).permute(0, 1, 4, 2, 3) / STD
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_standardised_tiles_have_no_brightness_and_contrast_of_their_own():
    tiles = 5 + 3 * torch.randn(3, TILES, 3, 6, 6, generator=torch.manual_seed(0))
    found = close_shortcuts(tiles, random(3), Tiling(size=6, standardise=True), STD)
    assert found.mean(dim=(3, 4)).abs().max() < 1e-5
    torch.testing.assert_close(found.std(dim=(3, 4), correction=0), torch.ones(3, TILES, 3), rtol=1e-3, atol=0)
    assert close_shortcuts(tiles * 0, random(3), Tiling(size=6, standardise=True), STD).isfinite().all()


def test_some_images_lose_their_colours():
    image = torch.randint(0, 256, (300, 3, 4, 4), dtype=torch.uint8, generator=torch.manual_seed(0))
    found = some_grey(image, random(300), Tiling(size=1, grey=0.3))
    grey = (found == found[:, :1]).all(dim=(1, 2, 3))
    assert 0.22 < float(grey.float().mean()) < 0.38 and torch.equal(found[~grey], image[~grey])
    luma = (image[grey].double() * torch.tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(dim=1)
    assert (found[grey][:, 0].double() - luma).abs().max() <= 0.5 + 1e-4


def test_tiles_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="need cells of 11 pixels, but images of 32x40 have 3x3 cells of 10"):
        Tiling(size=8, jitter=3).fit((32, 40), 3)
    with pytest.raises(ConfigError, match="3 channels, not of 1"):
        Tiling(size=8, colour="drop").fit((32, 32), 1)
    Tiling(size=8, jitter=2).fit((32, 32), 1)


def smooth(count: int, side: int, sigma: float) -> torch.Tensor:
    """Noise without any content, smooth over some pixels: float[count,1,side,side]."""
    noise = torch.randn(count, 1, side, side, generator=torch.manual_seed(3))
    frequency = torch.fft.fftfreq(side)
    damp = torch.exp(-2 * (torch.pi * sigma) ** 2 * (frequency[:, None] ** 2 + frequency**2))
    image = torch.fft.ifft2(torch.fft.fft2(noise) * damp).real
    return image / image.std()


def solved_by_borders(tiling: Tiling, count: int = 60) -> float:
    """Part of the puzzles that are solved by nothing but how well borders of tiles continue each other."""
    tiles = close_shortcuts(cut_tiles(smooth(count, 60, 1.5), random(count), tiling), random(count), tiling, STD[:1])
    permutations = distant_permutations(40)
    solved = 0
    for sample in range(count):
        own = sample % len(permutations)
        puzzle = tiles[sample, permutations[own], 0]
        misfits = []
        for permutation in permutations:
            put = puzzle[permutation.argsort()].view(3, 3, tiling.size, tiling.size)
            across = (put[:, :-1, :, -1] - put[:, 1:, :, 0]).square().mean()
            down = (put[:-1, :, -1] - put[1:, :, 0]).square().mean()
            misfits.append(float(across + down))
        solved += int(np.argmin(misfits) == own)
    return solved / count


def test_without_gaps_puzzles_of_pure_noise_are_solved_by_their_borders_and_with_gaps_they_are_not():
    assert solved_by_borders(Tiling(size=20)) > 0.95
    assert solved_by_borders(Tiling(size=20, standardise=True)) > 0.95
    assert solved_by_borders(Tiling(size=10, jitter=4, standardise=True)) < 0.15  # chance: 1/40


def aberrant(count: int, side: int) -> torch.Tensor:
    """Noise whose red and blue are magnified by a tenth against green, as by a cheap lens."""
    image = smooth(count, side, 1.0)
    line = torch.linspace(-1, 1, side) / 1.1
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1).expand(count, -1, -1, -1)
    large = torch.nn.functional.grid_sample(image, grid, align_corners=True)
    return torch.cat([large, image, large], dim=1)


def placed_by_fringes(colour: str, count: int = 20) -> float:
    """Part of the tiles around the middle whose place is told from the shift between their red and their green."""
    tiling = Tiling(size=14, colour=colour)
    tiles = close_shortcuts(
        cut_tiles(aberrant(count, 60), random(count), tiling), random(count), tiling, torch.ones(3, 1, 1)
    )
    right = 0
    for sample, tile in product(range(count), [t for t in range(TILES) if t != 4]):
        red, green = tiles[sample, tile, 0], tiles[sample, tile, 1]
        fit = {}
        for down, across in product(range(-3, 4), range(-3, 4)):
            inner = red[3:-3, 3:-3]
            moved = green[3 - down : 11 - down, 3 - across : 11 - across]
            fit[down, across] = float(torch.corrcoef(torch.stack([inner.flatten(), moved.flatten()]))[0, 1])
        down, across = max(fit, key=lambda shift: fit[shift])
        right += (np.sign(down) + 1) * 3 + np.sign(across) + 1 == tile
    return right / (count * 8)


def test_chromatic_aberration_gives_places_away_until_colours_are_dropped_or_projected():
    assert placed_by_fringes("keep") > 0.9
    assert placed_by_fringes("drop") < 0.25  # chance: 1/8
    assert placed_by_fringes("project") < 0.25
