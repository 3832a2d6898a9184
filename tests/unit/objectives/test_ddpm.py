import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipeline.core.errors import ConfigError, DataError, NonFiniteError
from pipeline.core.protocols import Clock, DataFacts, StepContext
from pipeline.nn.conditioning import Conditions, Told
from pipeline.nn.diffusion import likelihood
from pipeline.nn.diffusion.levels import add_noise
from pipeline.nn.diffusion.model import SamplerConfig
from pipeline.nn.diffusion.samplers import log_variance
from pipeline.nn.diffusion.space import to_model, to_pixels
from pipeline.objectives.ddpm import DDPM, Config

CTX = StepContext(seed=1, clock=Clock(0, 0, 100))
NETWORK = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "attention": (8,)}
SAMPLER = {"name": "ddim", "steps": 4}


def build(size=(16, 16), classes=5, stirred=True, **settings):
    torch.manual_seed(0)
    network = NETWORK | settings.pop("network", {})
    if settings.get("schedule") == "lognormal":
        settings.setdefault("sampler", {"name": "heun", "steps": 4, "spacing": "karras"})
    config = Config(**{"network": network, "sampler": SAMPLER} | settings)
    model = DDPM(config, DataFacts(size, tuple(f"class {i}" for i in range(classes))))
    if stirred:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
    return model


def batch(size=(16, 16), samples=8, first=0):
    generator = torch.Generator().manual_seed(5)
    return {
        "image": torch.randint(0, 256, (samples, 3, *size), dtype=torch.uint8, generator=generator),
        "label": torch.arange(samples) % 5,
        "id": torch.arange(first, first + samples),
        "epoch": torch.zeros(samples, dtype=torch.int64),
    }


def test_at_first_the_loss_is_the_variance_of_the_noise():
    """O10: to within the noise's own spread, 1 / sqrt(2 n)."""
    loss = build(stirred=False)(batch(samples=64), CTX).loss.detach()
    assert abs(float(loss) - 1) < 5 * (2 / (64 * 3 * 256)) ** 0.5


def test_at_first_a_learned_variance_is_half_way():
    """O10: the geometric mean of the least and the largest variance, at every level."""
    model = build(stirred=False, schedule="cosine", variance="learned")
    data = batch()
    _, level, x, *_ = model.noised(data, CTX)
    _, part = model.denoiser(x, level, model._told(data, CTX))
    torch.testing.assert_close(part, torch.full_like(part, 0.5), rtol=0, atol=0)
    levels = model.process.levels
    index = torch.tensor([1, 500, 999])
    found = log_variance(levels, index, "learned", part[:3], x[:3])[:, 0, 0, 0].exp()
    a = levels.a.double()[torch.stack([index - 1, index])] ** 2
    beta = 1 - a[1] / a[0]
    torch.testing.assert_close(found, (beta * beta * (1 - a[0]) / (1 - a[1])).sqrt(), rtol=1e-6, atol=0)


def test_flow_matching_is_the_plain_transcription():
    """Of SiT: x = (1 - u) image + u noise, the network is told u and answers noise - image."""
    model, data, told = build(schedule="flow", target="flow", condition="class").eval(), batch(), []
    model.denoiser.network.register_forward_pre_hook(lambda _, given: told.append(given))
    loss = model(data, CTX).loss
    ((seen, conditions),) = told
    u = CTX.random(data, "ddpm.level").uniform(1)[:, 0].double().view(-1, 1, 1, 1)
    noise = CTX.random(data, "ddpm.noise").normal(3, 16, 16).double()
    image = data["image"].double() / 127.5 - 1
    torch.testing.assert_close(seen.double(), (1 - u) * image + u * noise, rtol=0, atol=1e-5)
    torch.testing.assert_close(conditions.time, 1000 * u.flatten())
    answer = model.denoiser.network(seen, conditions)
    torch.testing.assert_close(loss.double(), (answer - (noise - image)).square().mean(), rtol=1e-5, atol=0)
    with torch.no_grad():
        for name in ("ddim", "heun"):
            made = model.generator().sample(torch.arange(2), data["label"][:2], 0, SamplerConfig(name=name, steps=3))
            assert made.isfinite().all()
        bits = model.generator().bits(data["image"], data["id"], data["label"], 0, 10)
    assert bits.shape == (8, 11) and bits.isfinite().all()


@pytest.mark.parametrize(
    ("target", "weight"), [("noise", "uniform"), ("image", "min_snr"), ("velocity", "min_snr"), ("edm", "edm")]
)
def test_loss_is_the_plain_transcription(target, weight):
    schedule = "lognormal" if target == "edm" else "cosine"
    model = build(target=target, weight=weight, schedule=schedule).eval()
    data = batch()
    quantile, level, x, noise, *_ = model.noised(data, CTX)
    a, s = (v.double().view(-1, 1, 1, 1) for v in (level.a, level.s))
    image = data["image"].double() / 127.5 - 1
    torch.testing.assert_close(x.double(), a * image + s * noise, rtol=1e-5, atol=1e-5)
    if schedule == "cosine":
        index = (quantile.double() * 1000).floor()
        torch.testing.assert_close(level.time, index)
    sigma = s / a
    skip, out, scale = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25).sqrt(), (sigma**2 + 0.25).rsqrt()
    seen = x / a * scale if target == "edm" else x
    answer = model.denoiser.network(seen.float(), Conditions(level.time, model._told(data, CTX))).double()
    of_image = {
        "noise": lambda: (x - s * answer) / a,
        "image": lambda: answer,
        "velocity": lambda: a * x - s * answer,
        "edm": lambda: skip * x / a + out * answer,
    }[target]()
    error = (of_image - image).square().mean(dim=(1, 2, 3))
    snr = (a / s).flatten() ** 2
    weights = {"uniform": snr, "min_snr": snr.clamp(max=5), "edm": 1 / out.flatten() ** 2}[weight]
    if weight == "uniform":  # of the noise
        weights = 1 / sigma.flatten() ** 2
    torch.testing.assert_close(model(data, CTX).loss.double(), (weights * error).mean(), rtol=2e-4, atol=1e-6)


def test_learned_variance_moves_by_the_bound_alone_and_the_mean_by_the_error_alone():
    model, plain = build(variance="learned"), build(variance="learned", hybrid_weight=1e-30)
    data = batch()
    gradients = []
    for each in (model, plain):
        each(data, CTX).loss.backward()
        gradients.append(each.denoiser.network.conv_out.weight.grad)
    torch.testing.assert_close(gradients[0][:3], gradients[1][:3])  # the mean's half
    assert gradients[0][3:].abs().max() > 1e-7 and gradients[1][3:].abs().max() < 1e-20


def test_hybrid_loss_has_the_papers_scale():
    """lambda = 0.001 times the sum over all levels, in bits; at 1000 levels that is one term."""
    model, data = build((8, 8), variance="learned", steps=40, network={"attention": ()}), batch((8, 8), samples=64)
    output = model(data, CTX)
    mse = float(output.metrics["mse"])
    assert output.loss.item() == pytest.approx(mse + 0.001 * float(output.metrics["bound"]), rel=1e-5)
    # `bound` estimates the sum over levels from one level per sample, without clipping: hold it against all levels
    total, levels = 0.0, model.process.levels
    with torch.no_grad():
        for i in range(40):
            index, level = torch.full((64,), i), levels.at(torch.full((64,), i))
            image = to_model(data["image"])
            x = add_noise(image, torch.randn(image.shape, generator=torch.Generator().manual_seed(i)), level)
            found = model.denoiser.denoise(x, level, Told())
            log = log_variance(levels, index, "learned", found.log_variance_part, x)
            total += float(likelihood.term(image, x, levels, index, found.image, log).mean())
    estimates = [float(model(data | {"epoch": data["epoch"] + e}, CTX).metrics["bound"]) for e in range(6)]
    assert np.mean(estimates) == pytest.approx(total, abs=4 * np.std(estimates) / 6**0.5 + 0.02 * total)


def test_quarters_are_an_unbiased_split_of_the_loss():
    model, data = build(), batch(samples=64)
    output = model(data, CTX)
    quarters = [float(output.metrics[f"loss_q{q}"]) for q in range(4)]
    assert sum(quarters) / 4 == pytest.approx(output.loss.item(), rel=1e-5)
    quantile, *_ = model.noised(data, CTX)
    assert sorted(set((quantile * 4).long().tolist())) == [0, 1, 2, 3]


def test_bf16_draws_exactly_the_levels_of_the_schedule():
    model, data = build(), batch()
    exact = model.noised(data, CTX)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = build().bfloat16().noised(data, CTX)
    assert rough[2].dtype == torch.float32 and rough[1].a.dtype == torch.float64
    for one, other in ((exact[0], rough[0]), (exact[1].a, rough[1].a), (exact[2], rough[2]), (exact[3], rough[3])):
        assert torch.equal(one, other)


def test_levels_and_noise_belong_to_the_sample():
    model, data = build(condition="class", network={"dropout": 0.3}), batch()
    back = {name: value.flip(0) for name, value in data.items()}
    for one, other in zip(model.noised(data, CTX)[2:4], model.noised(back, CTX)[2:4], strict=True):
        assert torch.equal(one, other.flip(0))
    assert not torch.equal(model.noised(data | {"epoch": data["epoch"] + 1}, CTX)[2], model.noised(data, CTX)[2])


def test_classes_are_dropped_at_the_rate_per_sample_and_only_in_training():
    model = build(condition="class", drop_condition=0.25)
    data = batch(samples=4000)
    label = model._told(data, CTX).label
    dropped = label == 5
    assert abs(float(dropped.double().mean()) - 0.25) < 5 * (0.25 * 0.75 / 4000) ** 0.5
    assert torch.equal(label[~dropped], data["label"][~dropped])
    still = StepContext(1, CTX.clock, training=False)
    assert torch.equal(model._told(data, still).label, data["label"])


def test_dropout_is_off_in_eval_and_the_samples_own_in_training():
    model, data = build(network={"dropout": 0.5}), batch()
    losses = [model.train(mode)(data, CTX).loss.item() for mode in (True, True, False)]
    assert losses[0] == losses[1] != losses[2]
    parts = [model.train()({k: v[i : i + 4] for k, v in data.items()}, CTX).loss for i in (0, 4)]
    assert sum(parts).item() / 2 == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    "sampler",
    [
        {"name": "ancestral", "spacing": "leading"},
        {"name": "ddim", "eta": 0.5},
        {"name": "dpm_solver", "spacing": "linspace"},
        {"name": "heun", "spacing": "karras"},
    ],
)
def test_samples_are_the_same_in_any_batch(sampler):
    """O13: to rounding, since convolutions may take another algorithm for another size of batch."""
    model = build(condition="class").eval()
    config = SamplerConfig(**sampler, steps=5)
    ids = torch.arange(16) * 7
    with torch.no_grad():
        whole = model.generator().sample(ids, ids % 5, 3, config)
        other = model.generator().sample(ids, ids % 5, 4, config)
        for size, some in ((8, ids), (1, ids[:4])):
            parts = torch.cat([model.generator().sample(i, i % 5, 3, config) for i in some.split(size)])
            torch.testing.assert_close(parts, whole[: len(some)], rtol=0, atol=1e-4)
    assert (whole - other).abs().mean() > 0.05


def test_guidance_of_zero_and_one_are_the_bare_networks():
    """O7, first part: bit for bit."""
    model = build(condition="class").eval()
    ids, label = torch.arange(4), torch.arange(4)
    sample = lambda label, scale: model.generator().sample(  # noqa: E731
        ids, label, 0, SamplerConfig(**SAMPLER, guidance=scale)
    )
    with torch.no_grad():
        assert torch.equal(sample(label, 0.0), sample(None, 0.0))
        torch.testing.assert_close(sample(label, 0.0), sample(None, 1.0), rtol=0, atol=1e-5)
        told = sample(label, 1.0)
        torch.testing.assert_close(sample(label, 1.0 + 1e-7), told, rtol=0, atol=1e-4)
        assert (told - sample(None, 1.0)).abs().max() > 1e-4
        nowhere = SamplerConfig(**SAMPLER, guidance=3.0, guidance_from=1e9)
        assert torch.equal(model.generator().sample(ids, label, 0, nowhere), told)


def test_mistakes_are_named():
    free, told = build().eval(), build(condition="class").eval()
    ids = torch.arange(2)
    with pytest.raises(ConfigError, match="trained without classes"):
        free.generator().sample(ids, None, 0, SamplerConfig(guidance=2.0))
    with pytest.raises(ConfigError, match="trained without"):
        free.generator().sample(ids, ids, 0)
    with pytest.raises(ConfigError, match="class 9 is asked for; the model knows 0 to 4"):
        told.generator().sample(ids, torch.tensor([0, 9]), 0)
    with pytest.raises(DataError, match="labels run from 0 to 9"):
        told(batch() | {"label": torch.tensor([0, 1, 2, 3, 9, 1, 1, 1])}, CTX)
    with pytest.raises(ConfigError, match="the data set has no classes"):
        build(condition="class", classes=0)
    with pytest.raises(ConfigError, match="multiples of 2"):
        build((15, 16))
    with pytest.raises(ConfigError, match="there is no block 'up_9_0'"):
        build(feature_block="up_9_0")
    with pytest.raises(ConfigError, match='use "karras"'):
        build(schedule="lognormal", sampler=SAMPLER)
    with pytest.raises(ValidationError, match='set target = "velocity"'):
        Config(zero_terminal_snr=True)
    with pytest.raises(ConfigError, match="trained without classes"):  # and not at the first showcase, hours later
        build(sampler=SAMPLER | {"guidance": 2.0})
    with pytest.raises(ConfigError, match="does not know what to be guided away from"):
        build(condition="class", drop_condition=0.0, sampler=SAMPLER | {"guidance": 2.0})
    with pytest.raises(ConfigError, match="Heun's sampler needs some signal"):
        build(target="velocity", zero_terminal_snr=True, sampler={"name": "heun", "steps": 4})
    with pytest.raises(ConfigError, match="set steps"):
        build(schedule="lognormal", target="edm").generator().bits(batch()["image"], ids, None, 0, None)


def test_a_sample_that_is_not_finite_is_an_error():
    model = build(target="image").eval()
    with torch.no_grad():
        model.denoiser.network.conv_out.bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"sample 5 \(one of 2\) is not finite"):
        model.generator().sample(torch.tensor([5, 6]), None, 0)


def test_pixels_survive_the_round_trip():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pixels(to_model(every)), every)
    assert torch.equal(to_pixels(to_model(every) + 0.4 / 127.5), every)  # rounded, not cut off


def test_bits_do_not_depend_on_the_batch_and_noise_is_bad_at_them():
    model = build(steps=20, condition="class").eval()
    data = batch(samples=4)
    with torch.no_grad():
        whole = model.generator().bits(data["image"], data["id"], data["label"], 0, None)
        part = model.generator().bits(data["image"][2:], data["id"][2:], data["label"][2:], 0, None)
    assert whole.shape == (4, 21) and whole.dtype == torch.float64
    torch.testing.assert_close(part, whole[2:], rtol=1e-5, atol=1e-6)
    assert whole.sum(dim=1).min() > 8  # uniform noise cannot be known by less than 8 bits


def test_bits_are_of_clipped_images():
    model, data = build(steps=20, target="image").eval(), batch(samples=2)
    last, found = model.denoiser.network.conv_out, []
    with torch.no_grad():
        last.weight.zero_()
        for said in (1.0, 3.0, 0.9):
            last.bias.fill_(said)
            found.append(model.generator().bits(data["image"], data["id"], None, 0, None))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_the_transformer_is_trained_and_sampled_alike():
    dit = {"name": "dit", "patch": 4, "dim": 16, "depth": 2, "heads": 2, "dropout": 0.2}
    network = Config(network=dit, feature_block="block_1", condition="class", variance="learned", sampler=SAMPLER)
    model = DDPM(network, DataFacts((16, 16), tuple("abcde")))
    data = batch()
    first = model.train()(data, CTX)
    assert torch.equal(first.loss, model(data, CTX).loss)
    encoders = model.eval().encoders()
    assert encoders["image"](data["image"]).shape == (8, 16)
    assert model.generator().sample(torch.arange(2), None, 0).shape == (2, 3, 16, 16)


def test_a_model_that_was_always_told_its_class_shows_no_guidance_and_has_features_near_all_classes():
    model = build(condition="class", drop_condition=0.0, stirred=False)
    assert set(model.showcase(batch(), CTX)) == {"samples", "trajectory"}
    assert not model.denoiser.network.embedding.label.weight[-1].any()


def test_showcase_shows_what_sampling_gives():
    model = build(condition="class")
    pictures = model.showcase(batch(), CTX)
    assert set(pictures) == {"samples", "trajectory", "guidance"}
    top = pictures["samples"].image[:16, :16]
    expected = to_pixels(model.eval().generator().sample(torch.arange(1), torch.zeros(1).long(), CTX.seed))
    assert np.abs(top.astype(int) - expected[0].permute(1, 2, 0).numpy()).max() <= 1
    last = pictures["trajectory"].image[-16:, :16]
    assert np.abs(last.astype(int) - top).max() <= 1
