"""What is taken away and kept, losses by plain transcriptions, and a network that learns to put something back."""

import math

import pytest
import torch
from torch.nn.functional import interpolate

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Clock, DataFacts, StepContext
from pipeline.nn.generative.restoring import DownscaleConfig, degrade
from pipeline.objectives.restoration_gan import Config, RestorationGAN

CLOCK = Clock(0, 0, 100)
CRITIC, RESTORER = (StepContext(seed=1, clock=CLOCK, phase=phase) for phase in ("critic", "restorer"))
MASK, SMALL = {"name": "mask", "patch": 4, "ratio": 0.25}, {"name": "downscale", "factor": 4}


def build(size=(16, 16), **settings):
    torch.manual_seed(0)
    plain = {
        "task": MASK,
        "restorer": {"channels": 8, "blocks": 1, "halvings": 1},
        "critic": {"name": "dcgan", "widths": [4, 8], "spectral": False},
    }
    return RestorationGAN(Config(**plain | settings), DataFacts(size, ()))


def batch(samples=6):
    image = torch.randint(0, 256, (samples, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    ids = torch.arange(samples)
    return {"image": image.to(torch.uint8), "id": ids, "epoch": torch.zeros_like(ids)}


def stirred(model):
    with torch.no_grad():
        model.restorer.conv_out.weight.add_(0.05 * torch.randn_like(model.restorer.conv_out.weight))
    return model


@pytest.mark.parametrize("pattern", ["random", "block"])
def test_whole_patches_are_hidden_and_the_rest_stays_as_it_is(pattern):
    data, model = batch(), stirred(build(task=MASK | {"pattern": pattern}))
    own = model.degraded(data, RESTORER)
    cells = own.hidden[:, 0].unflatten(2, (4, 4)).unflatten(1, (4, 4)).transpose(2, 3).flatten(3)
    assert (cells.all(dim=3) == cells.any(dim=3)).all() and (cells.all(dim=3).sum(dim=(1, 2)) == 4).all()
    image = data["image"] / 127.5 - 1
    restored = model.restorer(own)
    seen = ~own.hidden.expand_as(image)
    assert torch.equal(restored[seen], image[seen]) and not own.given[:, :3][~seen].any()
    assert (restored[~seen] != image[~seen]).all()
    alone = {name: value[4:5] for name, value in data.items()}
    assert torch.equal(model.degraded(alone, RESTORER).hidden, own.hidden[4:5])
    other = model.degraded(data | {"epoch": data["epoch"] + 1}, RESTORER)
    assert not torch.equal(other.hidden, own.hidden)


def test_small_images_are_rounded_and_scaled_up_as_the_start():
    data, model = batch(), build(task=SMALL)
    own = degrade(DownscaleConfig(factor=4), data["image"], None)
    small = interpolate(data["image"].float(), scale_factor=0.25, mode="bicubic", antialias=True)
    small = small.round().clamp(0, 255)
    torch.testing.assert_close(own.given, small / 127.5 - 1, rtol=0, atol=1e-6)
    torch.testing.assert_close(own.base, interpolate(small, scale_factor=4.0, mode="bicubic") / 127.5 - 1)
    assert torch.equal(model.restorer(own), own.base)
    assert stirred(model).restorer(own).shape == (6, 3, 16, 16)


@pytest.mark.parametrize("task", [MASK, SMALL])
def test_the_restorers_loss_is_pixels_adversary_and_features(task):
    model, data = stirred(build(task=task, adversarial=0.3, features=0.2, pixel=2.0)), batch()
    output = model(data, RESTORER)
    own, image = model.degraded(data, RESTORER), data["image"] / 127.5 - 1
    restored = model.restorer(own)
    share = 0.25 if task is MASK else 1.0
    expected = []
    for i in range(6):
        error = (restored[i] - image[i]).abs().mean() / share
        judged, whole = model.critic(restored[i : i + 1]), model.critic(image[i : i + 1])
        fooled = torch.log1p(torch.exp(-judged.scores.double())).mean()
        apart = sum((a - b).abs().mean() for a, b in zip(judged.maps, whole.maps, strict=True)) / 2
        expected.append(2 * error + 0.3 * fooled + 0.2 * apart)
    torch.testing.assert_close(output.losses.double(), torch.stack(expected).detach(), rtol=1e-4, atol=1e-5)
    pixels = ((restored + 1) * 127.5).round().clamp(0, 255).detach()
    error = (pixels - data["image"].float()).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(output.metrics["psnr"], (20 * math.log10(255) - 10 * error.log10()).mean())
    output.loss.backward()
    assert all(p.grad is not None for p in model.restorer.parameters())


def test_the_critic_tells_restored_images_from_whole_ones():
    model, data = stirred(build(loss="hinge")), batch()
    output = model(data, CRITIC)
    restored = model.restorer(model.degraded(data, CRITIC))
    real, fake = model.critic(data["image"] / 127.5 - 1).scores[:, 0], model.critic(restored).scores[:, 0]
    expected = (1 - real).clamp(min=0) + (1 + fake).clamp(min=0)
    torch.testing.assert_close(output.losses, expected.detach(), rtol=1e-4, atol=1e-5)
    output.loss.backward()
    assert all(p.grad is None for p in model.restorer.parameters())


def test_before_its_start_the_critic_is_neither_heard_nor_moved():
    model, data = build(start=3, adversarial=0.5), batch()
    early = {phase: StepContext(seed=1, clock=Clock(2, 0, 100), phase=phase) for phase in ("critic", "restorer")}
    assert float(model(data, early["restorer"]).metrics["adversarial"]) == 0
    model(data, early["critic"]).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.critic.parameters())
    late = StepContext(seed=1, clock=Clock(3, 0, 100), phase="restorer")
    assert float(model(data, late).metrics["adversarial"]) > 0.2


def test_it_learns_what_to_put_back():
    """Images of one colour each: the hidden part is that of the rest, and grey is far from it."""
    model = build(adversarial=0.01)
    colours = torch.randint(0, 256, (16, 3, 1, 1), generator=torch.Generator().manual_seed(3))
    image = colours.expand(16, 3, 16, 16).to(torch.uint8)
    ours = {phase: [p for n, p in model.named_parameters() if n.startswith(f"{phase}.")] for phase in model.phases()}
    optimizers = {phase: torch.optim.Adam(own, 5e-3) for phase, own in ours.items()}
    for step in range(40):
        data = {"image": image, "id": torch.arange(16), "epoch": torch.full((16,), step)}
        for phase, optimizer in optimizers.items():
            optimizer.zero_grad()
            output = model(data, StepContext(seed=1, clock=Clock(step, 0, 100), phase=phase))
            output.loss.backward()
            optimizer.step()
    assert float(output.metrics["psnr"]) > float(output.metrics["psnr_given"]) + 4


def test_sizes_that_do_not_fit_are_named():
    for settings, message in (
        ({"task": MASK | {"patch": 5}}, r"task.patch = 5 does not divide images of 16x16"),
        ({"task": MASK | {"patch": 16}}, r"task.ratio = 0.25 of 1 patches hides none, or all"),
        ({"restorer": {"halvings": 5}}, r"restorer.halvings = 5"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(**settings)
    with pytest.raises(ConfigError, match=r"task.factor = 4 does not divide images of 18x18"):
        build((18, 18), task=SMALL)
