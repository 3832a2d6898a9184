"""Guidance on two classes and their union as Gaussians of one variance, where its outcome is known (O7)."""

import pytest
import torch
from torch import nn

from pipeline.core.errors import ConfigError
from pipeline.core.random import SampleRandom
from pipeline.nn.conditioning import Text
from pipeline.nn.diffusion import model
from pipeline.nn.diffusion.levels import schedule
from pipeline.nn.diffusion.model import Denoiser, Generator, SamplerConfig
from pipeline.nn.diffusion.process import Discrete
from pipeline.nn.diffusion.samplers import Denoised

MEANS, S = torch.tensor([0.4, -0.8, -0.2]).double(), 0.5
LEVELS = schedule("linear", 1000)


class Known(Denoiser):
    """E[image | x, class]; the last mean is that of no class."""

    def __init__(self):
        super().__init__(nn.Identity(), "image", False, classes=2)

    def denoise(self, x, level, told):
        a, s, _ = level
        m = MEANS[told.label].view(-1, 1, 1, 1)
        return Denoised(m + a * S**2 / (a**2 * S**2 + s**2) * (x - a * m))


def sample(label, **settings):
    config = SamplerConfig(name="ddim", steps=50, clip=False, **settings)
    generator = Generator(Known(), Discrete(LEVELS), (1, 2, 2), "small", config)
    return generator.sample(torch.arange(6), label, 0)


@pytest.mark.parametrize(("scale", "mean"), [(1.5, 0.7), (4.0, 2.2), (1.0, 0.4), (0.0, -0.2)])
def test_guided_samples_have_the_mean_beyond_and_the_same_spread(scale, mean):
    told, other = torch.zeros(6, dtype=torch.int64), torch.full((6,), 2)
    x, free = sample(told, guidance=scale), sample(other)
    # started from N(0, 1) and not from the marginal, a sample is k noise + (1 - k a_T) mean, with k the spread
    factor = (x - free) / (mean - float(MEANS[2])) if scale else torch.ones_like(x)
    torch.testing.assert_close(x.std(), free.std(), rtol=1e-9, atol=0)
    k = (x - x.mean()).std() / _noise().std()
    expected = 1 - k * LEVELS.a[999] if scale else torch.tensor(1.0).double()
    torch.testing.assert_close(factor, expected.expand_as(factor), rtol=1e-6, atol=0)


def _noise():
    """What the samples start from: an identity sampler's."""
    seen = []
    generator = Generator(Known(), Discrete(LEVELS), (1, 2, 2), "small", SamplerConfig(steps=2))
    known = generator.denoiser.denoise
    generator.denoiser.denoise = lambda x, level, told: (seen.append(x), known(x, level, told))[1]
    generator.sample(torch.arange(6), None, 0)
    return seen[0]


def test_guidance_is_confined_to_its_interval():
    told = torch.zeros(6, dtype=torch.int64)
    full, none = sample(told, guidance=3.0), sample(told)
    part = sample(told, guidance=3.0, guidance_from=0.3, guidance_to=3.0)
    assert (none.mean() < part.mean()) and (part.mean() < full.mean())
    assert torch.equal(sample(told, guidance=3.0, guidance_from=1e6), none)


def test_rescaled_guidance_brings_the_spread_back():
    told = torch.zeros(6, dtype=torch.int64)
    generator = Generator(Known(), Discrete(LEVELS), (1, 2, 2), "small", SamplerConfig())
    x, level = torch.randn(6, 1, 2, 2, dtype=torch.float64), LEVELS.at(torch.tensor(500))
    config = SamplerConfig(guidance=3.0, guidance_rescale=1.0)
    made = generator._guided(x, level, generator.denoiser.read(told, 6, x.device), config, guided=True).image
    plain = generator.denoiser.denoise(x, level, generator.denoiser.read(told, 6, x.device)).image
    torch.testing.assert_close(made.flatten(1).std(dim=1), plain.flatten(1).std(dim=1))


def test_guidance_leaves_the_variance_as_it_is_told():
    """Of what is asked for, and not of nothing."""

    class Learned(Known):
        def denoise(self, x, level, told):
            part = (told.label.double() / 2).view(-1, 1, 1, 1).expand_as(x)
            return super().denoise(x, level, told)._replace(log_variance_part=part)

    generator = Generator(Learned(), Discrete(LEVELS), (1, 2, 2), "learned", SamplerConfig())
    told, x = torch.tensor([0, 1, 0]), torch.randn(3, 1, 2, 2, dtype=torch.float64)
    said = generator.denoiser.read(told, 3, x.device)
    found = generator._guided(x, LEVELS.at(torch.tensor(500)), said, SamplerConfig(guidance=3.0), guided=True)
    assert found.log_variance_part[:, 0, 0, 0].tolist() == [0.0, 0.5, 0.0]


def test_a_model_of_classes_is_not_asked_for_texts():
    texts = Text(torch.zeros(6, 3, dtype=torch.int64), torch.ones(6, dtype=torch.int64))
    with pytest.raises(ConfigError, match='texts are asked of a model trained without; train with condition = "text"'):
        sample(texts)


@pytest.mark.parametrize("shape", [(3, 2, 2), (3, 64, 64), (1, 7, 7)])
def test_noise_drawn_ahead_is_that_drawn_one_by_one(shape):
    """What decides is only the name of the device; the numbers are made where the ids are."""

    def draws(device: str) -> list[torch.Tensor]:
        random = SampleRandom(5, "test", torch.zeros(3, dtype=torch.int64), torch.arange(3))
        return list(model._draws(random, shape, 7, torch.device(device)))

    one_by_one = SampleRandom(5, "test", torch.zeros(3, dtype=torch.int64), torch.arange(3))
    expected = [one_by_one.normal(*shape).double() for _ in range(7)]
    for found in (draws("cpu"), draws("cuda")):
        assert len(found) == 7 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
