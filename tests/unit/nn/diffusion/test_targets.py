import pytest
import torch

from pipeline.nn.diffusion import levels as lv
from pipeline.nn.diffusion import targets as tg

TARGETS = ("noise", "image", "velocity", "flow", "edm")
GENERATOR = torch.Generator().manual_seed(0)


def sample(n=12, dtype=torch.float64):
    levels = lv.schedule("cosine", 1000)
    index = torch.linspace(0, 990, n).long()
    image, noise = (torch.randn(n, 2, 3, 3, generator=GENERATOR, dtype=dtype) for _ in range(2))
    level = levels.at(index)
    return image, noise, lv.add_noise(image, noise, level), level


@pytest.mark.parametrize("target", TARGETS)
def test_the_right_answer_gives_the_image_back(target):
    image, noise, x, level = sample()
    answer = tg.of_training(target, image, noise, x, level)
    torch.testing.assert_close(tg.to_image(target, answer, x, level), image, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["min_snr", "edm"])
def test_a_weight_stands_for_the_same_loss_whatever_the_target(target, name):
    image, noise, x, level = sample()
    wrong = image + 0.01 * torch.randn_like(image)
    off = (wrong - image).square().mean(dim=(1, 2, 3))
    # the answer that stands for the wrong image, by solving to_image (affine in the answer) for it
    zero = tg.to_image(target, torch.zeros_like(x), x, level)
    slope = tg.to_image(target, torch.ones_like(x), x, level) - zero
    error = ((wrong - zero) / slope - tg.of_training(target, image, noise, x, level)).square().mean(dim=(1, 2, 3))
    snr, sigma = level.snr, level.sigma
    of_image = snr.clamp(max=5.0) if name == "min_snr" else (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    torch.testing.assert_close(tg.weight(name, target, level) * error, of_image * off, rtol=1e-6, atol=0)


def test_min_snr_meets_five_where_the_paper_has_it():
    """O8, and the level at which the clipping begins."""
    for name, expected in (("linear", 130), ("cosine", 261)):
        levels = lv.schedule(name, 1000)
        level = levels.at(torch.arange(1000))
        noise, velocity = tg.weight("min_snr", "noise", level), tg.weight("min_snr", "velocity", level)
        torch.testing.assert_close(noise * level.snr, level.snr.clamp(max=5), rtol=1e-12, atol=0)
        torch.testing.assert_close(velocity * (level.snr + 1), level.snr.clamp(max=5), rtol=1e-12, atol=0)
        assert int((level.snr > 5).sum()) == pytest.approx(expected, abs=1)


def test_weights_are_finite_without_signal():
    level = lv.schedule("linear", 100, zero_terminal_snr=True).at(torch.arange(100))
    for target in ("image", "velocity", "flow", "edm"):
        for name in ("uniform", "min_snr", "edm"):
            assert tg.weight(name, target, level).isfinite().all()
    image, noise = torch.rand(1, 3, 2, 2), torch.randn(1, 3, 2, 2)
    last = lv.Level(*(v[-1:] for v in level))
    x = lv.add_noise(image, noise, last)
    assert torch.equal(x, noise)
    assert tg.to_image("velocity", -image, x, last).allclose(image)
    assert tg.to_image("flow", noise - image, x, last).allclose(image)


def test_edm_is_the_papers_preconditioning():
    """Table 1 of Karras et al., in their variables: D(y; sigma) = c_skip y + c_out F(c_in y)."""
    sigma = torch.logspace(-2.5, 2, 12, dtype=torch.float64)
    level = lv.from_sigma(sigma)
    y, answer = torch.randn(12, 1, dtype=torch.float64), torch.randn(12, 1, dtype=torch.float64)
    x = level.a[:, None] * y
    total = (sigma**2 + 0.25)[:, None]
    expected = 0.25 / total * y + sigma[:, None] * 0.5 / total.sqrt() * answer
    torch.testing.assert_close(tg.to_image("edm", answer, x, level), expected)
    torch.testing.assert_close(tg.to_input("edm", x, level), y / total.sqrt())
    # their loss weight makes the network's own squared error count evenly at all levels
    torch.testing.assert_close(tg.weight("edm", "edm", level), torch.ones(12, dtype=torch.float64))


def test_noise_is_the_score():
    """The score-matching identity on Gaussian data: E[noise | x] = -s * d/dx log q(x), with q known."""
    m, sd = 0.3, 0.5
    level = lv.schedule("linear", 1000).at(torch.tensor([0, 100, 400, 999]))
    x = torch.linspace(-3, 3, 4, dtype=torch.float64).requires_grad_()
    variance = level.a**2 * sd**2 + level.s**2
    density = -((x - level.a * m) ** 2) / (2 * variance)
    (score,) = torch.autograd.grad(density.sum(), x)
    image = (x + level.s**2 * score) / level.a  # Tweedie
    best = m + level.a * sd**2 / variance * (x - level.a * m)
    torch.testing.assert_close(image, best)
    noise = (x - level.a * best) / level.s
    torch.testing.assert_close(tg.to_image("noise", noise, x, level), best)
    torch.testing.assert_close(-level.s * score, noise)
