"""Mixtures against the formula of PixelCNN++'s authors, transcribed; they sum to one, and are drawn as they say."""

import itertools
import math

import pytest
import torch
from torch.nn import functional

from pipeline.nn.generative.mixture import LogisticMixture, drawn


def plain(mixture, image, said):
    """The authors' `discretized_mix_logistic_loss` without its floors, a pixel and a component at a time."""
    k, c = mixture.components, mixture.channels
    total = torch.zeros(len(image), dtype=torch.float64)
    for b, row, column in itertools.product(range(len(image)), range(image.shape[2]), range(image.shape[3])):
        numbers = said[b, :, row, column].double()
        logits, means, scales, rest = numbers.split([k, k * c, k * c, len(numbers) - k - 2 * k * c])
        x = 2 * image[b, :, row, column].double() / (mixture.levels - 1) - 1
        half, terms = 1 / (mixture.levels - 1), []
        for i in range(k):
            mean, log_scale = means[i * c : i * c + c].clone(), scales[i * c : i * c + c].clamp(min=-7)
            coefficients = rest[i * len(rest) // k : (i + 1) * len(rest) // k].tanh()
            if c == 3:
                mean[1] += coefficients[0] * x[0]
                mean[2] += coefficients[1] * x[0] + coefficients[2] * x[1]
            log = functional.log_softmax(logits, dim=0)[i]
            for j in range(c):
                plus = (x[j] - mean[j] + half) / log_scale[j].exp()
                minus = (x[j] - mean[j] - half) / log_scale[j].exp()
                if x[j] < -0.999:
                    log = log + torch.sigmoid(plus).log()
                elif x[j] > 0.999:
                    log = log + (1 - torch.sigmoid(minus)).log()
                else:
                    log = log + (torch.sigmoid(plus) - torch.sigmoid(minus)).log()
            terms.append(log)
        total[b] += torch.stack(terms).logsumexp(0)
    return total


@pytest.mark.parametrize("channels", [1, 3])
def test_it_is_the_authors_formula(channels):
    torch.manual_seed(0)
    mixture = LogisticMixture(channels, 4)
    image = torch.randint(0, 256, (3, channels, 2, 3), dtype=torch.uint8)
    image[0, :, 0], image[1, :, 1] = 0, 255
    said = torch.randn(3, mixture.numbers, 2, 3, dtype=torch.float64)
    said[:, 4 + 4 * channels : 4 + 8 * channels] -= 1.5
    said[2, 4 + 4 * channels] = -9  # narrower than a component can become
    expected = plain(mixture, image, said)
    torch.testing.assert_close(mixture.log_likelihood(image, said), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mixture.log_likelihood(image, said.float()).double(), expected, rtol=1e-4, atol=1e-4)


def test_improbable_values_have_no_floor():
    """A logistic tail falls as exp(-distance / scale); the authors' code has 1e-12 there, or the density."""
    mixture = LogisticMixture(1, 1)
    said = torch.tensor([0.0, 0.9, -5.0]).view(1, 3, 1, 1)
    far = torch.tensor([[[[20]]]], dtype=torch.uint8)
    found = float(mixture.log_likelihood(far, said))
    inverse = math.exp(5.0)
    distance = 0.9 - (2 * 20 / 255 - 1)
    expected = (-distance + 1 / 255) * inverse + math.log(1 - math.exp(-2 / 255 * inverse))
    assert found < -200 and found == pytest.approx(expected, rel=1e-5)


def every(mixture):
    values = itertools.product(range(mixture.levels), repeat=mixture.channels)
    return torch.tensor(list(values), dtype=torch.uint8)


@pytest.mark.parametrize(("channels", "levels"), [(1, 256), (3, 4)])
def test_probabilities_of_a_pixel_sum_to_one_and_it_is_drawn_by_them(channels, levels):
    torch.manual_seed(1)
    mixture = LogisticMixture(channels, 3, levels)
    said = torch.randn(1, mixture.numbers)
    pixels = every(mixture)
    log = mixture.log_likelihood(pixels[:, :, None, None], said[..., None, None].expand(len(pixels), -1, 1, 1))
    probability = log.double().exp()
    assert float(probability.sum()) == pytest.approx(1, abs=1e-5)
    draws = 20_000
    uniform = torch.rand(draws, 1 + channels)
    made = mixture.sample(said.expand(draws, -1), uniform).long()
    place = (made * levels ** torch.arange(channels - 1, -1, -1)).sum(dim=1)
    counts = torch.bincount(place, minlength=len(pixels)).double()
    often = probability * draws > 20
    spread = ((counts - probability * draws) / (probability * draws).sqrt())[often]
    assert int(often.sum()) > 20
    assert float(spread.square().mean()) == pytest.approx(1, abs=0.6)


def test_one_of_several_is_drawn_by_its_probability():
    logits = torch.log(torch.tensor([[0.1, 0.6, 0.3]], dtype=torch.float64)).expand(5, -1)
    uniform = torch.tensor([0.0999, 0.1001, 0.6999, 0.7001, 1 - 2.0**-25], dtype=torch.float64)
    assert drawn(logits, uniform).tolist() == [0, 1, 1, 2, 2]
    extreme = torch.tensor([[-200.0, 0.0, -200.0]], dtype=torch.float64)
    assert drawn(extreme, torch.tensor([1 - 2.0**-25], dtype=torch.float64)).tolist() == [1]
