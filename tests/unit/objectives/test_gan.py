"""Losses and penalties by plain transcriptions, who is moved by what, singular vectors, samples by their ids."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import relu

from pipeline.core.errors import ConfigError, DataError, NonFiniteError
from pipeline.core.protocols import Clock, DataFacts, StepContext
from pipeline.nn.generative import adversarial, critics
from pipeline.nn.generative.adversarial import PenaltyConfig
from pipeline.nn.generative.spectral import SpectralNorm, follow, spectrally_normed
from pipeline.objectives.gan import GAN, Config, Drawing

CRITIC = StepContext(seed=1, clock=Clock(0, 0, 100), phase="critic")
GENERATOR = StepContext(seed=1, clock=Clock(0, 0, 100), phase="generator")
GENERATORS = {"latent": 4, "widths": [8, 8, 8], "norm": "group"}
SMALL = {
    "resnet": {"name": "resnet", "widths": [8, 8], "halvings": 1},
    "dcgan": {"name": "dcgan", "widths": [4, 8]},
    "patch": {"name": "patch", "channels": 4, "layers": 1, "norm": False},
}


def build(classes=0, **settings):
    torch.manual_seed(0)
    condition = {"condition": "class"} if classes else {}
    config = Config(**{"generator": GENERATORS, "critic": SMALL["resnet"]} | condition | settings)
    return GAN(config, DataFacts((16, 16), tuple(f"class {i}" for i in range(classes))))


def batch(samples=8):
    image = torch.randint(0, 256, (samples, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    ids = torch.arange(samples)
    return {"image": image.to(torch.uint8), "label": ids % 3, "id": ids, "epoch": torch.zeros_like(ids)}


def scores(samples=6, places=3):
    generator = torch.Generator().manual_seed(1)
    return (2 * torch.randn(samples, places, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("kind", ["non_saturating", "hinge", "wasserstein"])
def test_losses_are_those_of_the_papers(kind):
    real, fake = scores()
    d = torch.sigmoid
    by_hand = {
        "non_saturating": (-(d(real).log() + (1 - d(fake)).log()), -d(fake).log()),
        "hinge": (-(torch.minimum(real - 1, real * 0) + torch.minimum(-fake - 1, fake * 0)), -fake),
        "wasserstein": (-(real - fake), -fake),
    }[kind]
    torch.testing.assert_close(adversarial.critic_loss(kind, real, fake), by_hand[0].mean(1))
    torch.testing.assert_close(adversarial.generator_loss(kind, fake), by_hand[1].mean(1))


def two_layers(samples=5):
    """A critic whose gradient is known: v . relu(W x), and images in general position."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(7, 12, generator=generator, dtype=torch.float64).requires_grad_()
    last = torch.randn(7, generator=generator, dtype=torch.float64).requires_grad_()
    real, fake = (torch.randn(samples, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    part = torch.rand(samples, generator=generator, dtype=torch.float64)
    return weight, last, real, fake, part


@pytest.mark.parametrize("kind", ["gradient", "r1"])
def test_penalties_and_their_gradients_equal_the_closed_form(kind):
    weight, last, real, fake, part = two_layers()
    config = PenaltyConfig(kind=kind, weight=3.0)
    found = adversarial.penalty(config, lambda x: (relu(x.flatten(1) @ weight.T) @ last)[:, None], real, fake, part)
    expected = []
    for one, other, t in zip(real.flatten(1), fake.flatten(1), part, strict=True):
        at = one if kind == "r1" else one + t * (other - one)
        slope = ((weight @ at > 0) * last) @ weight
        expected.append(1.5 * (slope**2).sum() if kind == "r1" else 3 * ((slope**2).sum().sqrt() - 1) ** 2)
    torch.testing.assert_close(found, torch.stack(expected))
    ours = torch.autograd.grad(found.mean(), (weight, last))
    theirs = torch.autograd.grad(torch.stack(expected).mean(), (weight, last))
    for one, other in zip(ours, theirs, strict=True):
        assert other.norm() > 0.1
        torch.testing.assert_close(one, other)


def test_a_penalty_is_known_without_gradients_too():
    model = build(penalty={"kind": "r1"})
    expected = model(batch(), CRITIC)
    with torch.no_grad():
        found = model(batch(), CRITIC)
    assert float(expected.metrics["penalty"]) > 0 and not found.loss.requires_grad
    torch.testing.assert_close(found.loss, expected.loss.detach())


@pytest.mark.parametrize("critic", SMALL)
def test_the_critics_phase_is_two_batches_told_apart(critic):
    model = build(critic=SMALL[critic], loss="wasserstein", penalty={"kind": "gradient", "weight": 2.0})
    data, norms = batch(), []
    noise = CRITIC.random(data, "gan.noise.critic").normal(4)
    part = CRITIC.random(data, "gan.between").uniform(1)
    fake, real = model.generator(noise, None).detach(), data["image"].float() / 127.5 - 1
    total = torch.zeros(())
    for one, other, t in zip(real, fake, part, strict=True):
        at = (t * other + (1 - t) * one)[None].requires_grad_()
        (slope,) = torch.autograd.grad(model.critic(at).scores.mean(), at, create_graph=True)
        norms.append(2 * (slope.norm() - 1) ** 2)
        total = total + model.critic(other[None]).scores.mean() - model.critic(one[None]).scores.mean() + norms[-1]
    output = model(data, CRITIC)
    torch.testing.assert_close(output.loss, total / 8, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.metrics["penalty"], torch.stack(norms).mean().detach(), rtol=1e-4, atol=1e-5)
    own = list(model.critic.parameters())
    pairs = zip(torch.autograd.grad(output.loss, own), torch.autograd.grad(total / 8, own), strict=True)
    for one, two in pairs:
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_the_critics_phase_makes_no_gradient_for_the_generator_and_leaves_its_statistics():
    model = build(generator={"latent": 4, "widths": [8, 8, 8]}).train()
    before = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
    model(batch(), CRITIC).loss.backward()
    assert before and all(torch.equal(dict(model.named_buffers())[name], value) for name, value in before.items())
    assert all(p.grad is None for p in model.generator.parameters())
    model(batch(), GENERATOR)
    assert not any(torch.equal(dict(model.named_buffers())[name], value) for name, value in before.items())


def test_noise_is_new_in_each_update_and_phase():
    model = build()
    given = []
    model.generator.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    for phase, repeat in (("critic", 0), ("critic", 1), ("critic", 2), ("generator", 0)):
        model(batch(), StepContext(1, CRITIC.clock, phase=phase, repeat=repeat))
    assert len({tuple(z.flatten().tolist()) for z in given}) == 4


def test_with_parts_each_update_sees_its_own():
    model, seen = build(parts=2), []
    model.critic.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    data = batch()
    real = data["image"].float() / 127.5 - 1
    for repeat in range(3):
        model(data, StepContext(1, CRITIC.clock, phase="critic", repeat=repeat))
    for found, rows in zip(seen[::2], (real[0::2], real[1::2], real[0::2]), strict=True):
        assert torch.equal(found, rows)
    with pytest.raises(ConfigError, match=r"parts = 2 does not divide a micro-batch of 7"):
        model({name: value[:7] for name, value in data.items()}, CRITIC)


def test_spectral_norms_are_torchs_and_a_forward_moves_nothing():
    torch.manual_seed(0)
    ours, theirs = torch.nn.Conv2d(3, 5, 3), torch.nn.Conv2d(3, 5, 3)
    theirs.load_state_dict(ours.state_dict())
    spectrally_normed(ours)
    theirs = torch.nn.utils.parametrizations.spectral_norm(theirs).eval()
    norm, (reference,) = ours.parametrizations.weight[0], theirs.parametrizations.weight
    for name in ("u", "v"):
        getattr(reference, f"_{name}").copy_(getattr(norm, name))
    x = torch.randn(2, 3, 6, 6)
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    ours.train()
    torch.testing.assert_close(ours(x), theirs(x))
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    for layer in (ours, theirs):
        layer(x).square().sum().backward()
    originals = [layer.parametrizations.weight.original.grad for layer in (ours, theirs)]
    torch.testing.assert_close(*originals)


def test_singular_vectors_follow_the_weights_once_a_step():
    model = build()
    with torch.no_grad():
        for parameter in model.critic.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    norms = [m for m in model.critic.modules() if isinstance(m, SpectralNorm)]
    assert len(norms) == 6
    layer = model.critic.blocks[1].conv2
    apart = abs(float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) - 1)
    for _ in range(20):
        model.after_step(Clock(1, 8, 100))
    assert abs(float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) - 1) < min(1e-3, apart)
    plain = build(critic={"name": "resnet", "widths": [8, 8], "halvings": 1, "spectral": False})
    follow(plain.critic)
    assert not [m for m in plain.critic.modules() if isinstance(m, SpectralNorm)]


def test_how_unlike_images_are_is_a_mean_over_pairs():
    x = torch.tensor([[0.0, 0], [3, 4], [1, 1], [1, 2], [9, 9]])
    assert float(adversarial.unlike(x)) == 13.0
    assert float(adversarial.unlike(x[:1])) == 0.0


def test_a_generator_that_makes_one_image_is_seen():
    model = build()
    output = model(batch(), CRITIC)
    assert float(output.metrics["unlike_real"]) > 0 and float(output.metrics["unlike_fake"]) > 0
    with torch.no_grad():
        model.generator.linear.weight.zero_()
    assert float(model(batch(), CRITIC).metrics["unlike_fake"]) < 1e-9


@pytest.mark.parametrize("kind", ["resnet", "dcgan"])
def test_samples_belong_to_their_ids_and_classes_are_told(kind):
    model = build(3, generator={"name": kind, "latent": 4, "widths": [8, 8, 8]}).eval()
    with torch.no_grad():
        for name, table in model.named_parameters():
            if name.startswith("generator.") and ("scale" in name or "shift" in name):
                table.add_(torch.randn(table.shape))
    maker, ids = model.encoders()["generator"], torch.arange(5)
    label = {"label": ids % 3}
    all_of_them = maker.make(ids, label, 7, Drawing())
    assert all_of_them.dtype == torch.uint8 and all_of_them.shape == (5, 3, 16, 16)
    few = maker.make(ids[3:], {"label": ids[3:] % 3}, 7, Drawing())
    assert (few.int() - all_of_them[3:].int()).abs().max() <= 1
    assert not torch.equal(all_of_them, maker.make(ids, label, 8, Drawing()))
    assert not torch.equal(all_of_them, maker.make(ids, {"label": (ids + 1) % 3}, 7, Drawing()))
    with torch.no_grad():
        model.generator.conv.bias.fill_(math.nan)
    with pytest.raises(NonFiniteError, match=r"sample 0 \(one of 5\) is not finite; the generator has diverged"):
        maker.make(ids, label, 7, Drawing())


def test_classes_are_scored_by_projection():
    model = build(3)
    data = batch()
    real = data["image"].float() / 127.5 - 1
    found = model.critic(real, data["label"])
    h = found.maps[-1].sum(dim=(2, 3))
    answer = model.critic.answer
    expected = h @ answer.linear.weight[0] + answer.linear.bias + (answer.label.weight[data["label"]] * h).sum(1)
    torch.testing.assert_close(found.scores[:, 0], expected)
    with pytest.raises(DataError, match="labels run from 0 to 5"):
        model(data | {"label": torch.arange(8) % 6}, CRITIC)


def test_it_learns_a_colour():
    """Data of one colour and a little noise: the generator finds it, and so do samples."""
    generator = {"latent": 4, "widths": [8, 8], "norm": "group"}
    model = build(loss="non_saturating", critic=SMALL["dcgan"], generator=generator)
    data = batch(16)
    data["image"] = torch.tensor([230, 40, 120]).view(3, 1, 1).expand(16, 3, 16, 16).to(torch.uint8)
    ours = {phase: [p for n, p in model.named_parameters() if n.startswith(f"{phase}.")] for phase in model.phases()}
    optimizers = {phase: torch.optim.Adam(own, 5e-3, (0.0, 0.9)) for phase, own in ours.items()}
    for step in range(40):
        for phase, optimizer in optimizers.items():
            optimizer.zero_grad()
            data["epoch"] = torch.full((16,), step)
            model(data, StepContext(1, Clock(step, 0, 100), phase=phase)).loss.backward()
            optimizer.step()
        model.after_step(Clock(step + 1, 0, 100))
    made = model.encoders()["generator"].make(torch.arange(16), {}, 0, Drawing()).float()
    assert float((made - data["image"]).abs().mean()) < 40


def test_settings_that_do_not_go_together_are_named():
    with pytest.raises(ValidationError, match=r"set critic.norm = false"):
        Config(critic={"name": "patch"}, penalty={"kind": "r1"})
    with pytest.raises(ValidationError, match=r"halvings = 3: there are 2 blocks"):
        Config(critic={"name": "resnet", "widths": [8, 8], "halvings": 3})
    for settings, classes, message in (
        ({"condition": "class"}, 0, "the data set has no classes"),
        ({"generator": {"widths": [8] * 6}}, 0, "multiples of 32 pixels; they are 16x16"),
        ({"critic": {"name": "resnet", "widths": [8] * 5, "halvings": 5}}, 0, "critic.halvings"),
        ({"critic": {"name": "dcgan", "widths": [8] * 6}}, 0, "critic.widths"),
        ({"critic": {"name": "patch", "layers": 3}}, 0, "take fewer, or images of at least 24"),
        ({"critic": SMALL["patch"]}, 3, "a critic of patches is told no classes"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(classes, **settings)


def test_critics_of_the_papers_have_their_sizes():
    """SNGAN, table 4, as torch_mimicry counts them; VQGAN's of three layers."""
    with torch.device("meta"):
        sngan = GAN(Config(), DataFacts((32, 32), ()))
        patch = critics.critic_of(critics.PatchCriticConfig(), (256, 256), 3)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (sngan.generator, sngan.critic, patch)]
    assert sizes == [4_276_739, 1_053_825, 2_765_633]
