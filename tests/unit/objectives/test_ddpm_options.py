"""Text, levels drawn by importance, the learned schedule, the bound as a loss, and what is offered to diffusers."""

import json

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Clock, DataFacts, StepContext
from pipeline.dist.group import process_group
from pipeline.nn.conditioning import Text, Told
from pipeline.nn.diffusion.importance import REMEMBERED
from pipeline.nn.diffusion.model import SamplerConfig
from pipeline.nn.diffusion.space import to_model
from pipeline.objectives.ddpm import DDPM, Config
from tests.unit.objectives.test_ddpm import CTX, SAMPLER, batch, build

TEXT = {"condition": "text", "text": {"vocab": 30, "length": 5, "width": 8, "depth": 1, "heads": 2}}
LEARNED = {"schedule": "learned", "target": "noise", "weight": "bound"}


def texts(samples=8):
    generator = torch.Generator().manual_seed(3)
    length = torch.arange(samples) % 5 + 1
    return {"text": torch.randint(0, 30, (samples, 5), generator=generator), "text_length": length}


def test_texts_are_listened_to_and_padding_is_not():
    model = build(**TEXT, drop_condition=0.0)
    assert model.needs["text"] == "int64[B,5]" and model.needs["text_length"] == "int64[B]"
    data = batch() | texts()
    loss = model(data, CTX).loss
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert float(model.denoiser.reader.encoder.token_embedding.weight.grad.abs().sum()) > 0
    padded = data["text"].clone()
    padded[torch.arange(5) >= data["text_length"][:, None]] += 7
    torch.testing.assert_close(model(data | {"text": padded % 30}, CTX).loss, loss)
    assert abs((model(data | {"text": data["text"].flip(0)}, CTX).loss - loss).item()) > 1e-6


def test_texts_are_dropped_at_their_rate():
    model = build(**TEXT, drop_condition=0.25)
    inside = model._told(batch(samples=2000) | texts(2000), CTX).inside
    part = float((inside.sum(dim=1) == 1).double().mean())
    assert abs(part - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5
    still = StepContext(1, CTX.clock, training=False)
    assert (model._told(batch() | texts(), still).inside.sum(dim=1) == texts()["text_length"] + 1).all()


def test_samples_follow_texts_and_guidance_starts_from_none():
    model = build(**TEXT).eval()
    ids, said = torch.arange(8), Text(*texts().values())
    made = lambda prompt, scale: model.generator().sample(ids, prompt, 0, SamplerConfig(**SAMPLER, guidance=scale))  # noqa: E731
    with torch.no_grad():
        told, none = made(said, 1.0), made(None, 1.0)
        torch.testing.assert_close(made(said, 0.0), none, rtol=0, atol=1e-3)
        torch.testing.assert_close(made(said, 1.0 + 1e-7), told, rtol=0, atol=1e-3)
        assert (told - none).abs().max() > 2e-3
        shown = model._prompt(batch() | texts(), torch.arange(11))
        assert torch.equal(shown.token[8:], shown.token[:3]) and len(shown.length) == 11
        with pytest.raises(ConfigError, match="classes are asked of a model trained without"):
            made(ids, 1.0)


def test_importance_draws_hard_levels_more_often_and_keeps_the_expectation():
    model = build((8, 8), draw="importance", steps=8, network={"attention": ()})
    data = batch((8, 8))
    for step in range(40):
        model(data | {"epoch": data["epoch"] + step}, CTX)
        model.after_step(Clock(step + 1, 8 * step, 1000))
    assert (model.importance.seen >= REMEMBERED).all() and int(model.importance.seen.sum()) == 320
    p = model.importance.probabilities()
    assert p.max() > p.min()
    many = batch((8, 8), samples=2000)
    quantile, level, x, noise, factor, *_ = model.noised(many, CTX)
    index = model.process.index(quantile)
    torch.testing.assert_close(factor, 1 / (8 * p[index]))
    share = torch.bincount(index, minlength=8).double() / 2000
    assert (share - p).abs().max() < 5 * (0.25 / 2000) ** 0.5
    # the mean over levels of any loss of a level stays as it was
    assert abs(float((factor * index).mean()) - 3.5) < 0.2
    with torch.no_grad():
        error = (model.denoiser(x, level, Told())[0] - noise).square().mean(dim=(1, 2, 3))
        loss, metrics, *_ = model(many, CTX)
    assert float(loss) == pytest.approx(float((factor * error).mean()), rel=1e-5)
    assert float(metrics["mse"]) == pytest.approx(float(loss), rel=1e-5)
    assert abs(float(loss) - float(error.mean())) > 1e-5 * float(loss)


def taught(folder):
    """What this rank has learned of the levels from its share of a dozen global batches; saved for the next test."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = build((8, 8), draw="importance", steps=4, network={"attention": ()})
    data = batch((8, 8))
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    for step in range(12):
        for half in (slice(0, 8 // world // 2), slice(8 // world // 2, None)):  # two micro-batches
            part = {name: value[mine][half] for name, value in data.items()}
            model(part | {"epoch": part["epoch"] + step}, CTX)
        model.after_step(Clock(step + 1, 8 * step, 1000))
    torch.save((model.importance.history, model.importance.seen), folder / f"{world}-{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("importance")


def test_one_rank_learns_the_levels(folder, lone_group):
    taught(folder)


@pytest.mark.world_size(2)
def test_two_ranks_learn_the_levels(folder):
    with process_group(timeout_minutes=1):
        taught(folder)


def test_ranks_agree_on_the_levels_that_are_drawn(folder):
    (history, seen), *others = (torch.load(folder / f"{part}.pt") for part in ("1-0", "2-0", "2-1"))
    assert (seen >= REMEMBERED).all() and int(seen.sum()) == 96  # so that they are no longer drawn evenly
    assert torch.equal(others[0][0], others[1][0]) and torch.equal(others[0][1], others[1][1])
    assert torch.equal(others[0][1], seen)
    torch.testing.assert_close(others[0][0], history, rtol=1e-5, atol=1e-6)


def test_importance_is_state():
    one, other = build(draw="importance", steps=8), build(draw="importance", steps=8)
    one(batch(), CTX)
    one.after_step(Clock(1, 8, 100))
    assert not one._fresh and int(one.importance.seen.sum()) == 8
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.importance.history, one.importance.history)


def test_the_bound_is_a_loss_of_its_own():
    model = build((8, 8), weight="bound", variance="learned", steps=40, network={"attention": ()})
    data = batch((8, 8))
    output = model(data, CTX)
    output.loss.backward()
    hybrid = build((8, 8), variance="learned", steps=40, network={"attention": ()})(data, CTX)
    assert output.loss.item() == pytest.approx(float(hybrid.metrics["bound"]), rel=1e-5)
    gradient = model.denoiser.network.conv_out.weight.grad
    assert gradient[:3].abs().max() > 1e-4 and gradient[3:].abs().max() > 1e-4  # the mean learns from it too


def test_the_learned_schedule_is_trained_and_sampled():
    model = build((8, 8), **LEARNED, network={"attention": ()})
    output = model(batch((8, 8), samples=16), CTX)
    output.loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert all(float(p.grad.abs().sum()) > 0 for p in model.process.parameters())
    # uniform noise in 256 values takes 8 bits, and a denoiser that knows nothing more
    assert output.loss.item() > 8
    with torch.no_grad():
        made = model.eval().generator().sample(torch.arange(2), None, 0)
        image = batch((8, 8), samples=2)
        bits = model.generator().bits(image["image"], image["id"], None, 0, 20)
    assert made.isfinite().all() and bits.sum(dim=1).min() > 8


def test_options_that_do_not_go_together_are_named():
    for settings, message in (
        ({"schedule": "learned"}, 'weight = "bound"'),
        ({"schedule": "lognormal", "weight": "bound"}, "goes with it alone"),
        ({**LEARNED, "target": "velocity"}, 'target = "noise"'),
        ({**LEARNED, "draw": "importance"}, 'draw = "importance" needs a discrete schedule, not "learned"'),
        ({"schedule": "flow", "target": "noise"}, 'set target = "flow"'),
        ({"schedule": "flow", "target": "flow", "draw": "importance"}, "needs a discrete schedule"),
        ({"schedule": "lognormal", "variance": "learned"}, 'variance = "learned" needs a discrete schedule'),
        ({"condition": "text", "network": {"name": "dit"}}, 'set network.name = "unet"'),
    ):
        with pytest.raises(ValidationError, match=message):
            Config(**settings)


def test_what_diffusers_cannot_hold_is_not_written_and_says_why():
    dit = {"name": "dit", "patch": 4, "dim": 16, "depth": 1, "heads": 2}
    wide = {"channels": 128, "multipliers": (1,), "attention": ()}
    for settings, reason in (
        ({"network": {"channels": 16}}, "number of groups"),
        ({"network": dit, "feature_block": "block_0"}, "this network is a transformer"),
        ({"network": {"resample": "residual", "multipliers": (1, 1)}}, "no skip connection"),
        ({"network": {"embedding": "fourier"}}, "logarithm"),
        ({"steps": 500}, "500 steps"),
        ({"schedule": "lognormal", "target": "edm"}, "EDM"),
        (TEXT, "told no text"),
        (LEARNED, "continuous"),
    ):
        if "name" in settings.get("network", {}):
            model = DDPM(Config(**settings, sampler=SAMPLER), DataFacts((16, 16), ()))
        else:
            model = build(**settings | {"network": wide | settings.get("network", {})})
        (offered,) = model.exports().values()
        assert offered.content is None and reason in offered.note


def test_exports_are_whole():
    model = build(condition="class", network={"channels": 128, "multipliers": (1, 1), "attention": (8,)})
    files = model.exports()
    weights = files["diffusers/unet/diffusion_pytorch_model.safetensors"].content
    net = model.denoiser.network
    assert sum(v.numel() for v in weights.values()) == sum(p.numel() for p in net.parameters())
    config = json.loads(files["diffusers/unet/config.json"].content)
    assert config["num_class_embeds"] == 6 and config["down_block_types"] == ["DownBlock2D", "AttnDownBlock2D"]
    betas = torch.tensor(json.loads(files["diffusers/scheduler/scheduler_config.json"].content)["trained_betas"])
    kept = (1 - betas.double()).cumprod(0)
    torch.testing.assert_close(kept, model.process.levels.a**2, rtol=1e-5, atol=1e-7)
    assert to_model(torch.tensor([255], dtype=torch.uint8)) == 1
