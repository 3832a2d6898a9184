"""Bits and nats in their units, an autoencoder from its file, samples by their numbers, and what is refused."""

import json
import math

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from pipeline.core.errors import ConfigError, DataError
from pipeline.core.evaluation import Likely
from pipeline.core.protocols import Clock, DataFacts, StepContext
from pipeline.nn.generative.autoencoder import to_diffusers
from pipeline.nn.generative.mixture import LogisticMixture
from pipeline.nn.weights import FACTS, save
from pipeline.objectives import vae, vq_vae
from pipeline.objectives.autoregressive import Autoregressive, Config, Drawing, Plainly

CTX = StepContext(seed=1, clock=Clock(0, 0, 100))
PIXELS = {"filters": 4, "blocks": 1, "sizes": 2, "components": 2, "dropout": 0.0}
CODED = {"channels": 4, "multipliers": (1, 2), "blocks": 1, "groups": 2, "latent": 3}
AUTOENCODER = {"kind": "vq_vae", "weights": "codes.safetensors", "network": CODED, "codes": 12}
TRANSFORMER = {"name": "transformer", "dim": 16, "depth": 2, "heads": 2, "dropout": 0.0}
CODES = {"network": TRANSFORMER, "autoencoder": AUTOENCODER}


def build(classes=0, size=(8, 8), **settings):
    torch.manual_seed(0)
    facts = DataFacts(size, tuple(f"class {i}" for i in range(classes)))
    condition = {"condition": "class"} if classes else {}
    return Autoregressive(Config(**{"network": PIXELS} | condition | settings), facts)


def batch(samples=6, first=0, size=(8, 8)):
    image = torch.randint(0, 256, (samples, 3, *size), generator=torch.Generator().manual_seed(first))
    ids = torch.arange(first, first + samples)
    return {"image": image.to(torch.uint8), "label": ids % 3, "id": ids, "epoch": torch.zeros_like(ids)}


def trained_codes(**settings):
    """A vector-quantised autoencoder with codes that are told apart."""
    torch.manual_seed(3)
    model = vq_vae.VQVAE(vq_vae.Config(network=CODED, codes=12, **settings), DataFacts((8, 8), ()))
    with torch.no_grad():
        model.quantiser.weight.copy_(torch.randn(12, 3))
    return model.eval()


def exported(path, model, **settings):
    config = {"objective": {"name": type(model).__module__.rpartition(".")[2], "network": CODED} | settings}
    save(path, model.state_dict(), {"config": json.dumps(config), FACTS: "{}"})
    return str(path)


def test_the_loss_of_pixels_is_in_bits_per_dimension():
    model, data = build(), batch()
    output = model(data, CTX)
    said, _ = model.model(data["image"])
    nats = LogisticMixture(3, 2).log_likelihood(data["image"], said)
    expected = -nats / (192 * math.log(2))
    torch.testing.assert_close(output.losses, expected.detach())
    assert float(output.metrics["bits_per_dim_exact"]) == pytest.approx(float(expected.detach().mean()), rel=1e-6)
    bits = model.encoders()["generator"].likelihood(data["image"], data["id"], {}, 0, None)
    assert bits.kind == "exact" and bits.total.dtype == torch.float64
    torch.testing.assert_close(bits.total.float(), expected.detach(), rtol=1e-6, atol=0)


def test_the_loss_of_codes_is_the_mean_of_what_each_is_said_to_be(tmp_path):
    model, data, teacher = build(**CODES), batch(), trained_codes()
    model.autoencoder.fill(exported(tmp_path / "codes.safetensors", teacher, codes=12))
    with torch.no_grad():
        index = teacher.encode(data["image"])[1].index.flatten(1)
    assert len(index.unique()) > 3
    logits, _ = model.model(index)
    expected = functional.cross_entropy(logits.flatten(0, 1), index.flatten())
    assert float(model(data, CTX).loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    # what is decoded of them is what the autoencoder itself would show
    own = model.autoencoder
    with torch.no_grad():
        shown = teacher.pixels.image(teacher.model.decode(teacher.encode(data["image"])[1].z))
    assert (own.image_of_codes(index.unflatten(1, (4, 4))).int() - shown.int()).abs().max() <= 1


def test_a_model_of_codes_claims_no_likelihood_of_images():
    generators = [model.eval().encoders()["generator"] for model in (build(), build(**CODES))]
    assert [isinstance(generator, Likely) for generator in generators] == [True, False]
    with pytest.raises(ConfigError, match="exact and has no steps"):
        generators[0].check_likelihood(10)


@pytest.mark.parametrize("settings", [{}, CODES], ids=["pixels", "codes"])
def test_a_sample_belongs_to_its_number(settings):
    model = build(classes=3, **settings).eval()
    generator = model.encoders()["generator"]
    ids = torch.arange(5)
    how = generator.settings({})
    made = generator.make(ids, {"label": ids % 3}, 7, how)
    assert made.shape == (5, 3, 8, 8) and made.dtype == torch.uint8
    some = torch.tensor([4, 1])
    assert torch.equal(generator.make(some, {"label": some % 3}, 7, how), made[some])
    assert not torch.equal(generator.make(ids, {"label": ids % 3}, 8, how), made)


def test_a_class_is_told():
    model, data = build(classes=3), batch()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    one, other = (model(data | {"label": torch.full((6,), k)}, CTX).loss.detach() for k in (0, 1))
    assert float((one - other).abs()) > 1e-3
    with pytest.raises(DataError, match="labels run from 0 to 5"):
        build(classes=3)(data | {"label": torch.arange(6)}, CTX)
    generator, ids = model.eval().encoders()["generator"], torch.arange(2)
    with pytest.raises(ConfigError, match="no class is asked for"):
        generator.make(ids, {}, 0, Plainly())
    with pytest.raises(ConfigError, match="class 3 is asked for; the model knows 0 to 2"):
        generator.make(ids, {"label": ids + 2}, 0, Plainly())
    with pytest.raises(ConfigError, match="trained without"):
        build().eval().encoders()["generator"].make(ids, {"label": ids}, 0, Plainly())


def test_training_learns_what_images_are_like():
    """Rows of two values by turns, either first: after the first of a row each pixel is sure."""
    first = torch.randint(0, 2, (16, 1, 4, 1), generator=torch.Generator().manual_seed(0))
    image = ((torch.arange(4) + first) % 2 * 128 + 64).to(torch.uint8)
    data = {"image": image, "id": torch.arange(16), "epoch": torch.zeros(16, dtype=torch.int64)}
    model = build(size=(4, 4), channels=1, network=PIXELS | {"sizes": 1, "filters": 8})
    optimizer, bits = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(data, CTX).loss
        loss.backward()
        optimizer.step()
        bits.append(float(loss.detach()))
    assert bits[-1] < bits[0] - 2


def test_an_autoencoder_of_another_kind_is_named(tmp_path):
    teacher = trained_codes()
    path = exported(tmp_path / "codes.safetensors", teacher, codes=12, cosine=True)
    with pytest.raises(ConfigError, match="was trained with cosine = True, and is to be used with False"):
        build(**CODES).autoencoder.fill(path)
    other = vae.VAE(vae.Config(network=CODED), DataFacts((8, 8), ()))
    path = exported(tmp_path / "vae.safetensors", other)
    with pytest.raises(ConfigError, match="was trained as 'vae', and kind = 'vq_vae' is asked for"):
        build(**CODES).autoencoder.fill(path)
    save(tmp_path / "plain.safetensors", teacher.state_dict(), {})
    settings = CODES | {"autoencoder": AUTOENCODER | {"codes": 16}}
    with pytest.raises(ConfigError, match=r"quantiser.weight is \(12, 3\) there and \(16, 3\) here"):
        build(**settings).autoencoder.fill(str(tmp_path / "plain.safetensors"))


def test_diffusers_weights_are_read_also_by_their_old_names(tmp_path):
    teacher, data = trained_codes(), batch()
    weights = to_diffusers(teacher.model) | {"quantize.embedding.weight": teacher.quantiser.weight}
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    for number, renamed in enumerate(({}, old)):
        stored = {}
        for name, value in weights.items():
            for new, former in renamed.items():
                name = name.replace(new, former)
            stored[name] = value
        path = str(tmp_path / f"{number}.safetensors")
        save(path, stored, {})
        own = build(**CODES).autoencoder
        own.fill(path)
        with torch.no_grad():
            expected = teacher.encode(data["image"])[1].index
        assert torch.equal(own.codes(data["image"]), expected)


def test_settings_that_do_not_go_together_are_named():
    for settings, message in (
        ({"network": TRANSFORMER}, "is of codes: give autoencoder"),
        ({"autoencoder": AUTOENCODER}, "is of pixels: leave autoencoder out"),
        ({"network": TRANSFORMER, "autoencoder": {"kind": "vae", "weights": "a"}}, 'with kind = "vq_vae"'),
        ({"network": TRANSFORMER, "autoencoder": AUTOENCODER | {"kind": "vae"}}, 'a "vae" has no codes'),
        ({"network": TRANSFORMER | {"heads": 3}}, "does not divide"),
    ):
        with pytest.raises(ValidationError, match=message):
            Config(**settings)
    with pytest.raises(ConfigError, match="the data set has no classes"):
        Autoregressive(Config(network=PIXELS, condition="class"), DataFacts((8, 8), ()))
    assert build(**CODES).eval().encoders()["generator"].settings({"temperature": 0.5}) == Drawing(temperature=0.5)
