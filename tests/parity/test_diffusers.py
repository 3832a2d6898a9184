"""The same numbers as diffusers, where its schedulers are right: not DDIM with "linspace", nor "trailing" over a T that
N does not divide, and not the variance of its first learned step."""

from __future__ import annotations

import pytest
import torch

from pipeline.core.protocols import DataFacts
from pipeline.nn.conditioning import Conditions, Told
from pipeline.nn.diffusion import levels as lv
from pipeline.nn.diffusion import samplers, targets
from pipeline.nn.diffusion.samplers import Denoised
from pipeline.objectives.ddpm import DDPM, Config
from pipeline.run.export import write

diffusers = pytest.importorskip("diffusers", reason="make parity installs it")

BETAS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
LINEAR = lv.schedule("linear", 1000)


def scheduler(cls, **settings):
    return cls(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, clip_sample=False, **settings)


def network(x, time):
    """Any answer will do: it must only be the same for both."""
    return torch.sin(3 * x + time / 300) * 0.7


def ours(target):
    def denoise(x, level):
        return Denoised(targets.to_image(target, network(x, level.time), x, level))

    return denoise


def theirs(scheduler, x, steps, **settings):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, **settings).prev_sample
    return x


@pytest.fixture
def start():
    return torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("zero", [False, True])
def test_schedules_and_noising(name, zero, start):
    other = scheduler(diffusers.DDPMScheduler, beta_schedule=BETAS[name], rescale_betas_zero_snr=zero)
    levels = lv.schedule(name, 1000, zero_terminal_snr=zero)
    torch.testing.assert_close(levels.a.float() ** 2, other.alphas_cumprod, rtol=2e-4, atol=2e-6)
    index = torch.tensor([0, 10, 500, 990])
    mine = lv.add_noise(start, start.flip(0), levels.at(index))
    torch.testing.assert_close(mine, other.add_noise(start, start.flip(0), index), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("variance", "name"), [("small", "fixed_small"), ("large", "fixed_large"), ("learned", "learned_range")]
)
def test_ancestral_steps(variance, name, start):
    """One step from each of a few levels, with the noise taken out of the difference of two."""
    other = scheduler(diffusers.DDPMScheduler, variance_type=name)
    for i in (1, 2, 100, 999):
        level = LINEAR.at(torch.tensor(i))
        image = ours("noise")(start, level).image
        mean = LINEAR.image_part[i] * image + LINEAR.noised_part[i] * start
        answer, part = network(start, torch.tensor(float(i))), torch.sin(start)
        if variance == "learned":
            answer = torch.cat([answer, part], dim=1)
        generator = torch.Generator().manual_seed(1)
        found = other.step(answer, i, start, generator=generator).prev_sample
        noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(1), dtype=start.dtype)
        log = samplers.log_variance(LINEAR, torch.tensor(i), variance, (part + 1) / 2, start)
        torch.testing.assert_close(mean + (log / 2).exp() * noise, found, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("target", ["noise", "velocity", "image"])
def test_ddim(target, start):
    kind = {"noise": "epsilon", "velocity": "v_prediction", "image": "sample"}[target]
    other = scheduler(diffusers.DDIMScheduler, prediction_type=kind, timestep_spacing="leading")
    mine = samplers.ddim(start, lv.spaced(LINEAR, 50, "leading"), ours(target), lambda: None)
    torch.testing.assert_close(mine, theirs(other, start, 50), rtol=1e-3, atol=1e-3)


# diffusers' scheduler itself, on numpy 2
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_dpm_solver(spacing, start):
    other = diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, algorithm_type="dpmsolver++", solver_order=2,
        timestep_spacing=spacing, final_sigmas_type="zero", lower_order_final=False, prediction_type="v_prediction",
    )  # fmt: skip
    other.set_timesteps(20)
    mine = samplers.dpm_solver(
        start, lv.spaced(LINEAR, 20, spacing) if spacing == "trailing" else _visited(other), ours("velocity")
    )
    torch.testing.assert_close(mine, theirs(other, start, 20), rtol=2e-3, atol=2e-3)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_heun(start):
    """Theirs keeps x / a, and visits every level but the noisiest twice."""
    other = diffusers.HeunDiscreteScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing"
    )
    other.set_timesteps(20)
    levels = lv.spaced(LINEAR, 20, "trailing")
    y = start / levels.a[-1]
    for t in other.timesteps:
        y = other.step(network(other.scale_model_input(y, t), t), t, y).prev_sample
    torch.testing.assert_close(samplers.heun(start, levels, ours("noise")), y, rtol=2e-3, atol=2e-3)


def _visited(scheduler):
    """Its "leading" divides by one step more than there are; visit what it visits."""
    return LINEAR.subset(scheduler.timesteps.flip(0).long())


@pytest.mark.parametrize(("scale_shift", "head_dim"), [(False, None), (True, 32)])
def test_exported_weights_are_loaded_strictly_and_answer_alike(scale_shift, head_dim, tmp_path):
    torch.manual_seed(0)
    network = {"channels": 128, "multipliers": [1, 1], "blocks": 1, "attention": [8], "scale_shift": scale_shift}
    config = Config(network=network | {"head_dim": head_dim}, variance="learned", condition="class", schedule="cosine")
    model = DDPM(config, DataFacts((16, 16), ("a", "b"))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    for name, offered in model.exports().items():
        write(tmp_path / name, offered)
    other, report = diffusers.UNet2DModel.from_pretrained(tmp_path / "diffusers" / "unet", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    x, index = torch.randn(3, 3, 16, 16), torch.tensor([0, 400, 999])
    label, level = torch.tensor([0, 1, 2]), model.process.levels.at(index)
    with torch.no_grad():
        answer = model.denoiser.network(x, Conditions(level.time, Told(label)))
        torch.testing.assert_close(other(x, index, label).sample, answer, rtol=1e-4, atol=1e-4)
    steps = diffusers.DDPMScheduler.from_pretrained(tmp_path / "diffusers" / "scheduler")
    torch.testing.assert_close(steps.alphas_cumprod.double(), model.process.levels.a**2, rtol=1e-4, atol=1e-6)
