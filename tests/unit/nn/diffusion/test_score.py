"""Predicting noise is matching the score, on a mixture of two Gaussians, whose score is known."""

import numpy as np
import pytest
import torch

from pipeline.nn.diffusion import levels as lv
from pipeline.nn.diffusion import targets

CENTRES, SHARES, WIDTH = torch.tensor([-0.8, 0.6]).double(), torch.tensor([0.3, 0.7]).double(), 0.2
LEVEL = lv.schedule("cosine", 1000).at(torch.tensor(400))


def score(x, level):
    """d/dx log q(x) by autograd."""
    x = x.detach().requires_grad_()
    v = level.a**2 * WIDTH**2 + level.s**2
    log_q = (SHARES.log() - (x[:, None] - level.a * CENTRES) ** 2 / (2 * v)).logsumexp(dim=1)
    return torch.autograd.grad(log_q.sum(), x)[0]


def joint():
    """Images and noises with their probabilities, for expectations by Gauss's quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    nodes, weights = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    image = (CENTRES[:, None, None] + WIDTH * nodes[None, :, None]).expand(2, 60, 60)
    noise = nodes.expand(2, 60, 60)
    p = SHARES[:, None, None] * weights[None, :, None] * weights
    return image.reshape(-1, 1), noise.reshape(-1, 1), p.flatten()


@pytest.mark.parametrize("target", ["noise", "image", "velocity", "edm"])
def test_the_best_answer_is_the_scores(target):
    """Tweedie: E[image | x] = (x + s^2 score) / a; no change of it makes the error of any target smaller."""
    image, noise, p = joint()
    x = lv.add_noise(image, noise, LEVEL)
    known = (x[:, 0] + LEVEL.s**2 * score(x[:, 0], LEVEL)) / LEVEL.a
    implied = (x[:, 0] - LEVEL.a * known) / LEVEL.s
    best = targets.of_training(target, known[:, None], implied[:, None], x, LEVEL)
    torch.testing.assert_close(targets.to_image(target, best, x, LEVEL)[:, 0], known, rtol=1e-9, atol=1e-9)
    aim = targets.of_training(target, image, noise, x, LEVEL)
    for change in (torch.ones_like(x), x, torch.sin(3 * x)):  # orthogonal to every function of x
        assert float(p @ ((best - aim) * change)[:, 0]) == pytest.approx(0, abs=1e-7)


def test_the_error_of_the_noise_is_that_of_the_score_but_for_a_constant():
    """E|answer - noise|^2 - E|answer' - noise|^2 = s^2 (E|score' - score|^2 - ...), with score' = -answer / s."""
    image, noise, p = joint()
    x = lv.add_noise(image, noise, LEVEL)
    known = score(x[:, 0], LEVEL)
    answers = (torch.zeros_like(x), torch.sin(2 * x), 0.8 * x + 0.1)
    denoising = [float(p @ (answer - noise)[:, 0] ** 2) for answer in answers]
    matching = [float(LEVEL.s**2 * (p @ (-answer[:, 0] / LEVEL.s - known) ** 2)) for answer in answers]
    gaps = [d - m for d, m in zip(denoising, matching, strict=True)]
    assert max(gaps) - min(gaps) < 1e-6 and max(denoising) - min(denoising) > 0.05
