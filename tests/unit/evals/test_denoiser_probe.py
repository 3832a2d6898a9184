import pytest
import torch
from torch import nn

from pipeline.core.errors import ConfigError
from pipeline.evals.denoiser_probe import Config, DenoiserProbe
from tests.unit.evals.generated import CLASSES, encoders, real, run


class Tapped(nn.Module):
    """A block of noise, a block that shows a coarse grey, and one that shows it exactly where there is little noise."""

    def __init__(self):
        super().__init__()
        self.taps = {"blind": 2, "coarse": 1, "fine": 1}
        self.one = nn.Parameter(torch.ones(1))

    def walk(self, x, given):
        mean = x.mean(dim=(1, 2, 3), keepdim=True) * self.one
        noise = torch.sin(1e4 * x[:, :2])
        yield "blind", noise
        yield "coarse", (mean > 0).float()
        yield "fine", torch.where(given.time.view(-1, 1, 1, 1) < 300, mean, 0.0)


def test_the_best_block_and_noise_are_found_on_held_out_images(lone_group):
    known = encoders()
    known["generator"].denoiser.network = Tapped()
    streams = {"train": real(200), "val": real(50, seed=1)}
    found = run(DenoiserProbe(Config(noise=(0.0, 0.9), l2=(1e-4,))), known, streams)
    grid = {name: r for name, r in found.items() if "@" in name}
    assert len(grid) == 6 and all(r.n == 20 and r.split == "train" for r in grid.values())
    assert max(grid, key=lambda name: grid[name].value) == "denoiser_probe/fine@0"
    assert grid["denoiser_probe/blind@0"].value < 0.6 and grid["denoiser_probe/coarse@0"].value < 0.7
    best = found["denoiser_probe/top1"]
    assert best.value > 0.9 and (best.n, best.split) == (50, "val")
    assert found["denoiser_probe/noise"].value == 0.0 and CLASSES == 5


def test_a_block_that_is_not_there_is_named(lone_group):
    known = encoders()
    known["generator"].denoiser.network = Tapped()
    with pytest.raises(ConfigError, match=r"there is no 'fin'.*fine"):
        run(DenoiserProbe(Config(blocks=("fin",))), known, {"train": real(40), "val": real(10)})
