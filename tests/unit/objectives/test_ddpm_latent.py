"""Latents in place of pixels: scaled, drawn of the posterior, decoded; and a block that is drawn to an encoder."""

import functools
import json

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from pipeline.core.errors import ConfigError, DataError
from pipeline.core.protocols import Clock, DataFacts, StepContext
from pipeline.engine.fragments import named_tensors
from pipeline.nn.diffusion.model import SamplerConfig
from pipeline.nn.weights import FACTS, save
from pipeline.objectives import vae, vq_vae
from pipeline.objectives.ddpm import DDPM, Config
from pipeline.run.frozen import leave_out

CTX = StepContext(seed=1, clock=Clock(0, 0, 100))
CODED = {"channels": 4, "multipliers": (1, 2), "blocks": 1, "groups": 2, "latent": 3}
LATENT = {"kind": "vae", "weights": "vae.safetensors", "network": CODED}
UNET = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "attention": (2,)}
PIXELS = UNET | {"attention": (4,)}
DIT = {"name": "dit", "patch": 2, "dim": 16, "depth": 3, "heads": 2}
ENCODER = {
    "weights": "encoder.safetensors",
    "encoder": "vit_tiny_patch16_224",
    "encoder_args": {"patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 2},
    "block": "block_1",
    "hidden": 8,
}


def build(**settings):
    torch.manual_seed(0)
    sampler = {"name": "ddim", "steps": 3}
    model = DDPM(Config(**{"network": UNET, "sampler": sampler} | settings), DataFacts((8, 8), ()))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def batch(samples=6, first=0):
    image = torch.randint(0, 256, (samples, 3, 8, 8), generator=torch.Generator().manual_seed(first))
    ids = torch.arange(first, first + samples)
    return {"image": image.to(torch.uint8), "id": ids, "epoch": torch.zeros_like(ids)}


@pytest.fixture
def autoencoder(tmp_path):
    """A variational autoencoder with some spread, and its export."""
    torch.manual_seed(3)
    model = vae.VAE(vae.Config(network=CODED), DataFacts((8, 8), ())).eval()
    with torch.no_grad():
        model.model.quant_conv.weight.mul_(3)
    path = tmp_path / "vae.safetensors"
    config = {"objective": {"name": "vae", "network": CODED}}
    save(path, model.state_dict(), {"config": json.dumps(config), FACTS: "{}"})
    return model, str(path)


def test_what_is_noised_is_a_draw_of_the_posterior_times_the_scale(autoencoder):
    teacher, path = autoencoder
    model, data = build(latent=LATENT | {"scale": 0.5}), batch()
    model.space.autoencoder.fill(path)
    own = model.noised(data, CTX)
    with torch.no_grad():
        posterior = teacher.posterior(data["image"])
    epsilon = CTX.random(data, "ddpm.latent").normal(3, 4, 4)
    z = posterior.mean + posterior.log_std.exp() * epsilon
    torch.testing.assert_close(own.clean, 0.5 * z)
    a, s = own.level.a.float().view(-1, 1, 1, 1), own.level.s.float().view(-1, 1, 1, 1)
    torch.testing.assert_close(own.x, a * own.clean + s * CTX.random(data, "ddpm.noise").normal(3, 4, 4))
    answer, _ = model.denoiser(own.x, own.level, model._told(data, CTX))
    expected = (answer - own.noise).square().mean()
    assert float(model(data, CTX).loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


@torch.no_grad()
def test_samples_are_decoded_and_belong_to_their_numbers(autoencoder):
    teacher, path = autoencoder
    model = build(latent=LATENT | {"scale": 0.5}).eval()
    model.space.autoencoder.fill(path)
    generator, ids = model.encoders()["generator"], torch.arange(4)
    latents = generator.sample(ids, None, 7)
    made = generator.make(ids, {}, 7, generator.settings({}))
    with torch.no_grad():
        decoded = teacher.pixels.image(teacher.model.decode(latents.float() / 0.5))
    assert latents.shape == (4, 3, 4, 4) and torch.equal(made, decoded)
    assert torch.equal(generator.make(ids[2:], {}, 7, generator.settings({})), made[2:])
    assert set(model.inputs(batch(), CTX)) == {"image"}
    # nothing is clipped: what the network expects is not held to what pixels can be
    seen = []
    generator.sample(ids, None, 7, watch=seen.append)
    with torch.no_grad():
        model.denoiser.network.conv_out.bias.fill_(-3.0)
    generator.sample(ids, None, 7, watch=seen.append)
    assert float(seen[-1].abs().max()) > 1


def test_latents_of_codes_are_quantised_when_they_are_decoded(tmp_path):
    torch.manual_seed(3)
    teacher = vq_vae.VQVAE(vq_vae.Config(network=CODED, codes=12), DataFacts((8, 8), ())).eval()
    with torch.no_grad():
        teacher.quantiser.weight.copy_(torch.randn(12, 3))
    save(tmp_path / "vq_vae.safetensors", teacher.state_dict(), {})
    model = build(latent=LATENT | {"kind": "vq_vae", "codes": 12, "scale": 2.0}).eval()
    model.space.autoencoder.fill(str(tmp_path / "vq_vae.safetensors"))
    image = batch()["image"]
    with torch.no_grad():
        before, own = teacher.encode(image)
        decoded = teacher.pixels.image(teacher.model.decode(own.z))
    clean = model.space.clean(image, None)
    torch.testing.assert_close(clean, 2 * before)
    assert (model.space.image(clean.double()).int() - decoded.int()).abs().max() <= 1


def test_the_scale_is_one_over_the_deviation_of_all_latents(lone_group):
    model, other = build(latent=LATENT), build(latent=LATENT | {"scale": 0.18215})
    assert not other.surveys() and float(other.space.scale) == pytest.approx(0.18215)
    (survey,) = model.surveys()
    parts = [batch(5), batch(3, first=5)]
    rows = [model.look(survey, part, CTX) for part in parts]
    model.surveyed(survey, {name: torch.cat([row[name] for row in rows]) for name in rows[0]}, CTX)
    z = torch.cat([model.space.autoencoder.latents(p["image"], CTX.random(p, "ddpm.latent")) for p in parts])
    assert float(model.space.scale) == pytest.approx(float(1 / z.double().std(correction=0)), rel=1e-5)
    assert float(torch.cat([model.noised(p, CTX).clean for p in parts]).std(correction=0)) == pytest.approx(1, rel=1e-5)
    with pytest.raises(DataError, match=r"set latent\.scale"):
        model.surveyed(survey, {"mean": torch.ones(2).double(), "square": torch.ones(2).double()}, CTX)


def test_the_autoencoder_goes_with_the_model_and_the_encoder_of_an_alignment_does_not():
    model = build(latent=LATENT, align=ENCODER, network=DIT, feature_block="block_0")
    parts = model.frozen()
    assert {name: origin.kept for name, origin in parts.items()} == {
        "space.autoencoder": True,
        "alignment.teacher": False,
    }
    saved = named_tensors(model)
    assert any(name.startswith("space.autoencoder.") for name in saved) and "space.scale" in saved
    assert not any(name.startswith("alignment.teacher") for name in saved)
    before = {name: value.clone() for name, value in model.space.state_dict().items()}
    leave_out(model)
    assert all(torch.equal(value, before[name]) for name, value in model.space.state_dict().items())
    model.eval()
    ids = torch.arange(2)
    generator = model.encoders()["generator"]
    assert generator.make(ids, {}, 0, generator.settings({})).shape == (2, 3, 8, 8)
    assert model.encoders()["image"](batch()["image"]).shape == (6, 16)


def test_of_latents_there_is_no_likelihood_and_no_bound():
    generator = build(latent=LATENT).eval().encoders()["generator"]
    with pytest.raises(ConfigError, match="of images there is no likelihood"):
        generator.check_likelihood(None)
    with pytest.raises(ConfigError, match="latents have no bounds"):
        generator.settings({"clip": True})
    assert SamplerConfig().clip is None
    for settings in ({"variance": "learned"}, {"weight": "bound"}):
        with pytest.raises(ValidationError, match="latents have not got"):
            Config(latent=LATENT, **settings)


def test_a_block_is_drawn_to_the_encoders_patches():
    """The loss has the mean negative cosine added; without noise in what the encoder sees."""
    model, data = build(network=DIT | {"patch": 4}, align=ENCODER | {"weight": 0.3}, feature_block="block_0"), batch()
    tokens = []
    model.denoiser.network.blocks[1].register_forward_hook(lambda m, i, out: tokens.append(out))
    output = model(data, CTX)
    backbone = model.alignment.teacher.encoder.backbone
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        patches = backbone.forward_features((data["image"] / 255 - mean) / std)[:, backbone.num_prefix_tokens :]
    projected = model.alignment.project(tokens[0])
    assert patches.shape == projected.shape == (6, 4, 12)
    cosine = (functional.normalize(patches, dim=2) * functional.normalize(projected, dim=2)).sum(dim=2).mean(dim=1)
    torch.testing.assert_close(output.losses - 0.3 * -cosine.detach(), plain_losses(model, data))
    assert float(output.metrics["align"]) == pytest.approx(float(-cosine.detach().mean()), rel=1e-5)
    output.loss.backward()
    assert model.alignment.project[0].weight.grad.any()
    assert all(p.grad is None for p in model.alignment.teacher.parameters())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, while it traces
@pytest.mark.parametrize(
    "network", [pytest.param(PIXELS, marks=pytest.mark.slow), DIT | {"patch": 4}], ids=["unet", "dit"]
)
def test_compiled_blocks_give_the_same_gradient_and_the_aligned_one_is_left(network, monkeypatch):
    """By torch's tracer alone, since generating kernels takes a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    transformer = network is not PIXELS
    settings = {"network": network, "feature_block": "block_0" if transformer else "middle_0"}
    settings |= {"align": ENCODER} if transformer else {"network": PIXELS | {"dropout": 0.2}}
    found, data = [], batch(2)
    for compiled in (False, True):
        model = build(compile=compiled, **settings)
        model(data, CTX).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
        own = dict(zip(model.denoiser.network.taps, model.denoiser.network.blocks, strict=True))
        left = {name for name, block in own.items() if block._compiled_call_impl is None}
        assert left == (set(own) if not compiled else {"block_1"} if transformer else set())
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def plain_losses(model, data):
    own = model.noised(data, CTX)
    with torch.no_grad():
        answer, _ = model.denoiser(own.x, own.level, model._told(data, CTX))
    return (answer - own.noise).square().flatten(1).mean(dim=1)


def test_an_alignment_that_does_not_fit_is_named():
    for settings, message in (
        ({"network": PIXELS}, 'network.name = "dit"'),
        ({"network": DIT}, "the encoder has 2x2 patches of images of 8x8, the network 4x4"),
        ({"network": DIT | {"patch": 4}, "align": ENCODER | {"block": "block_9"}}, "there is no 'block_9'"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(**{"align": ENCODER, "feature_block": "block_0"} | settings)
    assert build(network=DIT, align=ENCODER | {"image_size": 16}, feature_block="block_0").alignment is not None
    with pytest.raises(ValidationError, match="patches are not stored"):
        Config(network=DIT, align=ENCODER | {"stored": "dino"})
