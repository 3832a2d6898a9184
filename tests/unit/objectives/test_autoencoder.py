"""Autoencoders: error by hand, sparsity in closed form, contraction against the Jacobian."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, Clock, DataFacts, StepContext
from pipeline.objectives.autoencoder import Autoencoder, Config, bernoulli_divergence

CTX = StepContext(seed=1, clock=Clock(0, 0, 100))
VIT = {"patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2}


def build(size: tuple[int, int] = (16, 16), **settings: Any) -> Autoencoder:
    torch.manual_seed(0)
    defaults = {"encoder": "vit_tiny_patch16_224", "encoder_args": VIT, "decoder_dim": 16, "doublings": 2}
    return Autoencoder(Config(**defaults | settings), DataFacts(size, ()))


def batch(samples: int = 4) -> Batch:
    image = torch.randint(0, 256, (samples, 3, 16, 16), dtype=torch.uint8, generator=torch.manual_seed(5))
    ids = torch.arange(samples)
    return {"image": image, "id": ids, "epoch": torch.zeros_like(ids)}


def test_the_error_is_that_of_the_normalised_image():
    model, data = build().eval(), batch()
    out = model(data, CTX)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.config.mean, model.config.std))
    clean = (data["image"] / 255 - mean) / std
    made = model.decoder(model.encoder.backbone(clean)).detach()
    assert made.shape == clean.shape
    expected = ((made - clean) ** 2).reshape(4, -1).mean(dim=1)
    assert out.losses is not None
    torch.testing.assert_close(out.losses, expected, rtol=1e-4, atol=1e-5)
    assert float(out.metrics["mse"]) == pytest.approx(float(expected.mean()), rel=1e-4)
    assert float(out.metrics["penalty"]) == 0 and not model.compares


def test_what_is_damaged_is_to_be_made_whole():
    model, data = build(corruption={"noise": 0.5, "pixels": 0.3}).eval(), batch()
    clean, seen = model.encoder.normalize(data["image"]), model.seen(data, CTX)
    assert 0.2 < float((seen == 0).all(dim=1).float().mean()) < 0.4
    expected = (model.decoder(model.encoder.backbone(seen)) - clean).square().mean()
    torch.testing.assert_close(model(data, CTX).loss, expected, rtol=1e-4, atol=1e-5)
    assert set(model.inputs(data, CTX)) == {"image", "seen"}
    later, alone = data | {"epoch": data["epoch"] + 1}, {name: value[1:2] for name, value in data.items()}
    assert not torch.equal(model.seen(later, CTX), seen), "damaged anew in each epoch"
    torch.testing.assert_close(model.seen(alone, CTX)[0], seen[1])


def test_l1_is_the_mean_of_absolute_values():
    plain, sparse, data = build().eval(), build(sparsity="l1", sparsity_weight=0.7).eval(), batch()
    code = sparse.encoder(data["image"]).detach().double().numpy()
    out, without = sparse(data, CTX), plain(data, CTX)
    assert out.losses is not None and without.losses is not None
    np.testing.assert_allclose(out.losses - without.losses, 0.7 * np.abs(code).mean(axis=1), rtol=1e-4)
    assert float(out.metrics["penalty"]) == pytest.approx(0.7 * np.abs(code).mean(), rel=1e-4)


def test_the_divergence_is_that_of_the_mean_activations_of_the_batch():
    model, data = build(sparsity="kl", sparsity_weight=0.3, activity=0.2).eval(), batch()
    code = 1 / (1 + np.exp(-model.encoder(data["image"]).detach().double().numpy()))
    expected = 0.0
    for mean in code.mean(axis=0):
        expected += 0.2 * math.log(0.2 / mean) + 0.8 * math.log(0.8 / (1 - mean))
    out = model(data, CTX)
    assert model.compares and float(out.metrics["penalty"]) == pytest.approx(0.3 * expected, rel=1e-4)
    assert float(out.loss.detach()) == pytest.approx(float(out.metrics["mse"]) + 0.3 * expected, rel=1e-4)
    made = model.decoder(torch.from_numpy(code).float())
    error = float((made - model.encoder.normalize(data["image"])).detach().square().mean())
    assert float(out.metrics["mse"]) == pytest.approx(error, rel=1e-4), "the decoder sees what lies behind the sigmoid"


def test_the_divergence_in_closed_form():
    means = torch.tensor([0.05, 0.5, 0.9, 0.0, 1.0], dtype=torch.float64)
    found = bernoulli_divergence(0.05, means)
    coins = torch.distributions.Bernoulli(torch.tensor(0.05, dtype=torch.float64))
    other = torch.distributions.Bernoulli(means[:3])
    torch.testing.assert_close(found[:3], torch.distributions.kl_divergence(coins, other))
    assert abs(float(found[0])) < 1e-12 and found.isfinite().all()


def l1(code: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    return 0.7 * code.abs().mean()


def kl(code: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    mean = code.mean(dim=0)
    return 0.7 * (0.2 * (0.2 / mean).log() + 0.8 * (0.8 / (1 - mean)).log()).sum()


def contraction(code: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    return 0.7 * ((moved - code) / 0.5).square().sum(dim=1).mean()


@pytest.mark.parametrize(
    ("settings", "written"),
    [
        ({"sparsity": "l1", "sparsity_weight": 0.7}, l1),
        ({"sparsity": "kl", "sparsity_weight": 0.7, "activity": 0.2}, kl),
        ({"contraction": 0.7, "step": 0.5}, contraction),
    ],
    ids=["l1", "kl", "contraction"],
)
def test_penalties_move_the_encoder(settings, written):
    """Through all of their parts: gradients are those of the loss as it is written here."""
    model, data = build(**settings).eval(), batch()
    model(data, CTX).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    clean, noise = model.encoder.normalize(data["image"]), CTX.random(data, "autoencoder.contraction").normal(3, 16, 16)
    codes = [model.encoder.backbone(x) for x in (clean, clean + 0.5 * noise)]
    code, moved = (x.sigmoid() for x in codes) if written is kl else codes
    ((model.decoder(code) - clean).square().mean() + written(code, moved)).backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name not in found), name
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-5, msg=name)


def jacobian(model: Autoencoder, data: Batch) -> torch.Tensor:
    """Of the first sample, by autograd: float64[D, C*H*W]."""
    x = model.encoder.normalize(data["image"][:1]).double()
    found = torch.autograd.functional.jacobian(lambda own: model.encoder.features(own)[0], x)
    assert isinstance(found, torch.Tensor)
    return found.flatten(1)


def test_a_probe_of_the_jacobian_is_its_product_with_the_noise():
    model, data = build(contraction=0.7, step=1e-3).eval().double(), batch()
    noise = CTX.random(data, "autoencoder.contraction").normal(3, 16, 16)[0].double().flatten()
    expected = (jacobian(model, data) @ noise).square().sum()
    penalty = model.embed(data, CTX)["penalty"][0].detach()
    assert float(penalty) == pytest.approx(0.7 * float(expected), rel=5e-3)


def test_on_average_probes_are_the_squared_frobenius_norm():
    model, data = build(contraction=1.0, step=0.01).eval().double(), batch(1)
    many = {name: value.expand(1000, *value.shape[1:]) for name, value in data.items()} | {"id": torch.arange(1000)}
    with torch.no_grad():
        penalty = model.embed(many, CTX)["penalty"]
    expected = float(jacobian(model, data).square().sum())
    error = float(penalty.std()) / 1000**0.5
    assert float(penalty.mean()) == pytest.approx(expected, abs=4 * error) and 4 * error < 0.25 * expected


def test_both_sides_of_a_probe_drop_the_same():
    """Dropped otherwise, they would differ by far more than the noise makes them."""
    settings: dict[str, Any] = {"contraction": 1.0, "step": 1e-3, "encoder_args": VIT | {"proj_drop_rate": 0.5}}
    model = build(**settings).double()
    with torch.no_grad():
        dropping = float(model.train().embed(batch(), CTX)["penalty"].mean())
        assert dropping < 20 * float(model.eval().embed(batch(), CTX)["penalty"].mean())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="16x16 pixels are no whole map doubled 5 times"):
        build(doublings=5)
    with pytest.raises(ValidationError, match="probes the clean image"):
        Config(contraction=0.1, corruption={"noise": 1.0})  # type: ignore[arg-type]
