import random as python_random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

import pipeline.nn.randaugment as randaugment
from pipeline.core.random import SampleRandom
from pipeline.nn.randaugment import NOTHING, OPERATIONS, RandAugment, apply, rand_augment

FILL = (124, 116, 104)


def numbers(ids):
    return SampleRandom(0, "supervised.augment", torch.zeros_like(ids), ids)


def picture(seed, size=(40, 56)):
    """Something with smooth parts, edges, noise and a narrow range."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]] / 40
    smooth = np.stack([np.sin(3 * x + y + s) for s in rng.uniform(0, 6, 3)], -1) * 60 + 120
    smooth[8:20, 10:30] = rng.uniform(30, 220, 3)
    return (smooth + rng.normal(0, 5, smooth.shape)).clip(12, 240).astype(np.uint8)


def ours(image, name, level, sign=1.0):
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    one = torch.ones(1)
    out = apply(x, torch.tensor([OPERATIONS.index(name)]), level * one, sign * one, torch.tensor(FILL))
    return out[0].permute(1, 2, 0).numpy()


@pytest.fixture(autouse=True)
def pillow_takes_no_bits(monkeypatch):
    """At the highest magnitude timm asks for no bits, which newer Pillows refuse."""
    posterize = auto_augment.NAME_TO_OP["PosterizeIncreasing"]
    at_least_one = {"PosterizeIncreasing": lambda image, bits, **_: posterize(image, max(bits, 1))}
    monkeypatch.setattr(auto_augment, "NAME_TO_OP", auto_augment.NAME_TO_OP | at_least_one)


def timms(image, name, level, monkeypatch, sign=1):
    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda v: sign * v)
    hparams = {"img_mean": FILL, "interpolation": Image.BICUBIC}
    operation = auto_augment.AugmentOp(name, prob=1.0, magnitude=10 * level, hparams=hparams)
    return np.asarray(operation(Image.fromarray(image))).astype(np.float32)


def test_the_operations_are_those_of_timms_policy():
    assert sorted(OPERATIONS) == sorted(auto_augment._RAND_INCREASING_TRANSFORMS)


@pytest.mark.parametrize("name", OPERATIONS[:10])
@pytest.mark.parametrize("level", [0.0, 0.33, 0.87, 1.0])
@pytest.mark.parametrize("sign", [-1, 1])
def test_colours_are_those_of_pillow(monkeypatch, name, level, sign):
    for seed in range(3):
        expected = timms(picture(seed), name, level, monkeypatch, sign)
        found = ours(picture(seed), name, level, sign)
        assert abs(found - expected).max() <= 1 and (found != expected).mean() < 0.02, name


@pytest.mark.parametrize("name", OPERATIONS[10:])
@pytest.mark.parametrize("level", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("sign", [-1, 1])
def test_moves_are_those_of_pillow(monkeypatch, name, level, sign):
    image = picture(0)
    expected, found = timms(image, name, level, monkeypatch, sign), ours(image, name, level, sign)
    # bicubic kernels differ (Pillow's a = -0.5, torch's -0.75), and Pillow's border is hard
    assert np.median(abs(found - expected)) <= 1 and (abs(found - expected) > 12).mean() < 0.06, name


def test_an_image_with_a_large_white_part_is_equalized_as_by_pillow(monkeypatch):
    image = picture(0)
    image[:25] = 250
    assert (ours(image, "Equalize", 1.0) == timms(image, "Equalize", 1.0, monkeypatch)).all()


def test_operations_directions_and_magnitudes_are_drawn_as_they_should_be(monkeypatch):
    drawn = []
    monkeypatch.setattr(randaugment, "apply", lambda x, *what: (drawn.append(what), x)[1])
    ids = torch.arange(6000)
    rand_augment(torch.zeros(6000, 3, 1, 1, dtype=torch.uint8), numbers(ids), RandAugment(), torch.tensor(FILL))
    for operation, level, sign, _ in drawn:
        assert abs((operation == NOTHING).float().mean() - 0.5) < 0.03
        parts = torch.bincount(operation[operation != NOTHING], minlength=len(OPERATIONS)) / 3000
        assert (parts - 1 / len(OPERATIONS)).abs().max() < 0.02
        assert abs((sign == 1).float().mean() - 0.5) < 0.03 and set(sign.tolist()) == {-1.0, 1.0}
        assert abs(level.mean() - 0.9) < 0.005 and level.max() == 1 and abs(level.std() - 0.05) < 0.005
    assert len(drawn) == 2 and not torch.equal(drawn[0][0], drawn[1][0])


def test_flat_images_stay_as_they_are_where_there_is_nothing_to_stretch():
    flat = np.full((8, 8, 3), 77, np.uint8)
    for name in ("AutoContrast", "Equalize"):
        assert (ours(flat, name, 1.0) == 77).all()


def test_nothing_is_nothing():
    x = torch.from_numpy(picture(0)).permute(2, 0, 1)[None].float()
    one = torch.ones(1)
    assert torch.equal(apply(x, torch.tensor([NOTHING]), one, one, torch.tensor(FILL)), x)
    image = x.to(torch.uint8)
    off = rand_augment(image, numbers(torch.arange(1)), RandAugment(probability=0.0), torch.tensor(FILL))
    assert torch.equal(off, image)


def test_each_sample_is_augmented_by_numbers_of_its_own():
    ids = torch.arange(64)
    image = torch.from_numpy(np.stack([picture(i) for i in range(64)])).permute(0, 3, 1, 2)
    fill = torch.tensor(FILL)
    whole = rand_augment(image, numbers(ids), RandAugment(), fill)
    assert whole.dtype == torch.uint8 and whole.shape == image.shape
    piece = rand_augment(image[5:9], numbers(ids[5:9]), RandAugment(), fill)
    assert (piece.int() - whole[5:9].int()).abs().max() <= 1  # resampling may sum in another order
    same = (whole == image).flatten(1).all(1).float().mean()
    assert 0.1 < same < 0.45  # a quarter: neither of two operations is applied; and some change nothing


def test_as_often_and_as_much_as_timm():
    """The mean absolute change over many pictures agrees with timm's policy."""
    python_random.seed(0)
    np.random.seed(0)
    policy = auto_augment.rand_augment_transform(
        "rand-m9-mstd0.5-inc1", {"img_mean": FILL, "interpolation": Image.BICUBIC}
    )
    images = [picture(i) for i in range(400)]
    theirs = [abs(np.asarray(policy(Image.fromarray(i))).astype(float) - i).mean() for i in images]
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    out = rand_augment(x, numbers(torch.arange(400)), RandAugment(), torch.tensor(FILL))
    mine = (out.float() - x.float()).abs().mean((1, 2, 3)).numpy()
    error = (np.var(theirs) / 400 + mine.var() / 400) ** 0.5
    assert abs(mine.mean() - np.mean(theirs)) < 3 * error
