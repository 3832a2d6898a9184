"""PSNR and SSIM by transcriptions, and numbers that are the same on any number of ranks."""

import json
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline.core.errors import ConfigError
from pipeline.dist.group import process_group
from pipeline.evals.restoration import Config, Restoration
from pipeline.nn.image_quality import psnr, ssim
from tests.contracts.components import ListStream, context, numbers, plain


class Halved(nn.Module):
    """Given is a darker image; what is made of it is off by the sample's number."""

    def forward(self, image, ids, seed):
        return image // 2, (image.int() + ids.view(-1, 1, 1, 1) % 7 + 1 + seed).clamp(0, 255).to(torch.uint8)


def images(samples=23, size=12):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(20, 200, (samples, 3, size, size), generator=generator, dtype=torch.uint8)


def measured(rank=0, world=1, **settings):
    stream = ListStream(images(), torch.zeros(23, dtype=torch.int64), rank, world)
    return numbers(Restoration(Config(**settings)), context({"restorer": Halved()}, {"val": stream}))


def test_psnr_of_known_errors():
    image = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    other = image.clone()
    other[0] += 5
    assert psnr(image, other).tolist() == [pytest.approx(20 * math.log10(51), abs=1e-4), pytest.approx(88.13, abs=0.01)]


def test_ssim_is_the_papers():
    """Eq. 13 at each place that has a whole window, in plain loops over one image."""
    x, y = images(1, 13).double(), (images(1, 13) // 2 + 40).double()
    line = [math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)]
    weight = torch.tensor([[a * b for b in line] for a in line], dtype=torch.float64)
    weight /= weight.sum()
    found = []
    for channel in range(3):
        for top in range(3):
            for left in range(3):
                a, b = (v[0, channel, top : top + 11, left : left + 11] for v in (x, y))
                ma, mb = (weight * a).sum(), (weight * b).sum()
                va, vb = (weight * (a - ma) ** 2).sum(), (weight * (b - mb) ** 2).sum()
                both = (weight * (a - ma) * (b - mb)).sum()
                c1, c2 = 2.55**2, 7.65**2
                found.append((2 * ma * mb + c1) * (2 * both + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    torch.testing.assert_close(ssim(x.to(torch.uint8), y.to(torch.uint8))[0], torch.stack(found).mean())
    assert float(ssim(images(1), images(1))) == pytest.approx(1)


def test_what_is_made_stands_beside_what_was_given(lone_group):
    found = measured()
    assert set(found) == {f"restoration/{name}{given}" for name in ("psnr", "ssim") for given in ("", "_given")}
    expected = [20 * math.log10(255 / (i % 7 + 1)) for i in range(23)]
    assert found["restoration/psnr"].value == pytest.approx(sum(expected) / 23, rel=1e-5)
    assert found["restoration/psnr"].n == 23 and found["restoration/psnr"].better == "higher"
    assert found["restoration/psnr_given"].value < 20 < found["restoration/psnr"].value
    few = measured(samples=5)["restoration/psnr"]
    assert few.n == 5 and set(few.samples.tolist()) <= set(found["restoration/psnr"].samples.tolist())


def test_images_that_are_too_small_are_named(lone_group):
    stream = ListStream(images(size=8), torch.zeros(23, dtype=torch.int64))
    with pytest.raises(ConfigError, match="SSIM looks at 11 pixels, images are 8x8"):
        numbers(Restoration(Config()), context({"restorer": Halved()}, {"val": stream}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


def on_ranks(folder):
    with process_group(timeout_minutes=1):
        rank, world = dist.get_rank(), dist.get_world_size()
        found = [plain(number) for number in measured(rank, world, samples=9).values()]
        (folder / f"{world}-{rank}.json").write_text(json.dumps(found))


@pytest.mark.world_size(1)
def test_on_one_rank(folder):
    on_ranks(folder)


@pytest.mark.world_size(2)
def test_on_two_ranks(folder):
    on_ranks(folder)


def test_all_ranks_say_the_same(folder):
    first, *others = [(folder / f"{part}.json").read_text() for part in ("1-0", "2-0", "2-1")]
    assert others == [first] * 2
