"""Colour distortions against torchvision's, one sample at a time."""

import pytest
import torch
import torchvision.transforms.v2.functional as peer

from pipeline.core.protocols import Clock, StepContext
from pipeline.nn import augment as own
from pipeline.nn.augment import Colour, augment, blur

CTX = StepContext(seed=4, clock=Clock(0, 0, 100))
OFF = Colour(jitter=0, grey=0, blur=0)


def make(samples: int, side: int = 24) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.arange(samples) + 40
    image = torch.randint(0, 256, (samples, 3, side, side), dtype=torch.uint8, generator=generator)
    image[0] = 77  # a grey image has no hue
    return image, {"id": ids, "epoch": torch.zeros_like(ids)}


@pytest.mark.parametrize(
    ("operation", "theirs", "amounts"),
    [
        (own._brightness, peer.adjust_brightness, (0.2, 1.0, 1.8)),
        (own._contrast, peer.adjust_contrast, (0.2, 1.0, 1.8)),
        (own._saturation, peer.adjust_saturation, (0.2, 1.0, 1.8)),
        (own._hue, peer.adjust_hue, (-0.45, 0.0, 0.2)),
    ],
)
def test_each_operation_is_torchvisions(operation, theirs, amounts):
    x = make(4)[0].float() / 255
    for amount in amounts:
        found = operation(x, torch.full((4, 1, 1, 1), amount)).clamp(0, 1)
        torch.testing.assert_close(
            found, theirs(x, amount), rtol=0, atol=2e-3 if theirs is peer.adjust_contrast else 2e-5
        )


def test_blur_is_torchvisions_with_a_sigma_per_sample():
    x = make(3, side=40)[0].float() / 255
    sigma = torch.tensor([0.1, 0.9, 2.0])
    found = blur(x, sigma)
    for row, s in zip(range(3), sigma.tolist(), strict=True):
        torch.testing.assert_close(found[row], peer.gaussian_blur(x[row], [5, 5], [s, s]), rtol=0, atol=1e-5)


def test_nothing_is_done_with_everything_off_and_solarisation_inverts_the_bright():
    image, batch = make(3)
    plain = image.float() / 255
    assert torch.equal(augment(image, batch, CTX, OFF, "v"), plain)
    inverted = augment(image, batch, CTX, OFF.model_copy(update={"solarize": 1.0}), "v")
    assert torch.equal(inverted, torch.where(plain >= 0.5, 1 - plain, plain))


def test_what_happens_belongs_to_the_sample_and_the_view():
    image, batch = make(12)
    whole = augment(image, batch, CTX, Colour(solarize=0.3), "v")
    for rows in (slice(0, 5), slice(5, 12)):
        part = augment(image[rows], {n: v[rows] for n, v in batch.items()}, CTX, Colour(solarize=0.3), "v")
        torch.testing.assert_close(part, whole[rows], rtol=0, atol=1e-6)
    assert not torch.allclose(whole, augment(image, batch, CTX, Colour(solarize=0.3), "w"), atol=1e-2)
    assert whole.min() >= 0 and whole.max() <= 1


def test_frequencies_and_orders_are_as_configured():
    image, batch = make(2000, side=4)
    image[0] = image[1]
    grey = augment(image, batch, CTX, Colour(jitter=0, grey=0.2, blur=0), "v")
    part = float((grey.std(dim=1).amax(dim=(1, 2)) < 1e-6).float().mean())
    assert abs(part - 0.2) < 0.03
    jittered = augment(image, batch, CTX, Colour(grey=0, blur=0), "v")
    changed = float(((jittered - image / 255).abs().amax(dim=(1, 2, 3)) > 1e-6).float().mean())
    assert abs(changed - 0.8) < 0.03
