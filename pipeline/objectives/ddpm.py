"""Denoising diffusion: noise images, and learn to say what they were; sampling walks the noise back.

Ho et al., "Denoising Diffusion Probabilistic Models" (NeurIPS 2020), https://arxiv.org/abs/2006.11239; learned
variance and hybrid loss of Nichol and Dhariwal 2021 (2102.09672); continuous levels of Karras et al. 2022 (2206.00364).
Shape letters: B samples, C channels, H height, W width.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.protocols import Batch, DataFacts, Objective, Picture, StepContext, StepOutput
from pipeline.nn.conditioning import Conditions
from pipeline.nn.diffusion import likelihood, samplers, targets
from pipeline.nn.diffusion.levels import Level, add_noise, schedule
from pipeline.nn.diffusion.model import Denoiser, DenoiserFeatures, Generator, SamplerConfig, to_model, to_pixels
from pipeline.nn.diffusion.process import Discrete, LogNormal, Process
from pipeline.nn.diffusion.samplers import Variance
from pipeline.nn.diffusion.targets import Target, Weight
from pipeline.nn.dit import DiT, DiTConfig
from pipeline.nn.images import tile
from pipeline.nn.unet import UNet, UNetConfig

SHOWN = 8
"""Samples in a row of the showcase."""
MOMENTS = 6
"""Rows of the trajectory."""
SWEEP = (0.0, 1.0, 2.0, 4.0)
"""Guidance scales in the showcase."""


class Config(Strict):
    """Settings of diffusion training; the defaults are those of Ho et al. for CIFAR-10."""

    network: UNetConfig | DiTConfig = UNetConfig()
    """"unet" or "dit"."""
    schedule: Literal["linear", "cosine", "sigmoid", "lognormal"] = "linear"
    """Of a discrete process; or "lognormal", EDM's continuous one."""
    steps: Annotated[int, Field(ge=2)] = 1000
    """Levels of a discrete process."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that its last level is pure noise."""
    sigma_mean: float = -1.2
    """Of ln(sigma), "lognormal" only."""
    sigma_std: Annotated[float, Field(gt=0)] = 1.2
    target: Target = "noise"
    weight: Weight = "uniform"
    min_snr_gamma: Annotated[float, Field(gt=0)] = 5.0
    variance: Variance = "large"
    """Of the reverse process; "learned" is trained by the bound."""
    hybrid_weight: Annotated[float, Field(gt=0)] = 0.001
    """Of the bound, summed over the levels, beside the squared error."""
    condition: Literal["none", "class"] = "none"
    drop_condition: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Part of the samples that are not told their class, so that guidance has something to start from."""
    channels: Annotated[int, Field(ge=1)] = 3
    sampler: SamplerConfig = SamplerConfig()
    """Of the showcase, and of evaluations that do not say otherwise."""
    feature_block: str = "middle_1"
    """Block whose output is the image's features."""
    feature_noise: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Quantile of the noise levels at which features are taken."""

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        continuous = self.schedule == "lognormal"
        if continuous and self.zero_terminal_snr:
            raise ValueError('zero_terminal_snr rescales a discrete schedule; leave it out with "lognormal"')
        if continuous and self.variance == "learned":
            raise ValueError('a learned variance needs a discrete schedule; set variance = "large"')
        if self.zero_terminal_snr and self.target == "noise":
            raise ValueError(
                "with zero_terminal_snr the last level has no signal, so the image cannot be read from the noise; "
                'set target = "velocity"'
            )
        return self


class DDPM(Objective):
    """The denoiser and how it is trained."""

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        self.config = config
        self.needs = {"image": f"uint8[B,{config.channels},H,W]"}
        self.image_shape = (config.channels, *facts.image_size)
        self.classes = 0
        if config.condition == "class":
            if not facts.classes:
                raise ConfigError(
                    'objective.condition = "class": the data set has no classes; build it from a source with labels, '
                    'or set condition = "none"'
                )
            self.needs["label"] = "int64[B]"
            self.classes = len(facts.classes)
        self.process = _process(config)
        self.process.chain(config.sampler.steps, config.sampler.spacing)  # a mistake in it is found before training
        learned = config.variance == "learned"
        out = config.channels * (2 if learned else 1)
        shape = {"channels": config.channels, "out": out, "classes": self.classes}
        if isinstance(config.network, UNetConfig):
            network = UNet(config.network, facts.image_size, **shape)
        else:
            network = DiT(config.network, facts.image_size, **shape)
        self.dropouts = network.dropouts
        self.denoiser = Denoiser(network, config.target, learned)
        self._labels_checked = False
        self.encoders()  # a mistake in feature_block is found before training

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """Weighted squared error of the target; "loss_q0" to "loss_q3" are its means over quarters of the levels.

        A quarter's mean is taken as four times the mean of what falls into it, which is right in expectation and
        stays a mean over samples, however they are spread over ranks and micro-batches.
        """
        image = to_model(batch["image"])
        quantile, level, x, noise = self.noised(batch, ctx)
        answer, part = self.denoiser(x, level, self._conditions(batch, ctx, level))
        aim = targets.of_training(self.config.target, image, noise, x, level)
        error = (answer - aim).square().flatten(1).mean(dim=1)
        weight = targets.weight(self.config.weight, self.config.target, level, self.config.min_snr_gamma)
        loss = error * weight.float()
        metrics = {"mse": error.detach().mean()}
        if part is not None:
            bound = self._bound(image, x, quantile, level, answer, part)
            metrics["bound"] = bound.detach().mean()
            loss = loss + self.config.hybrid_weight * bound
        quarter = (quantile * 4).long()
        for q in range(4):
            metrics[f"loss_q{q}"] = 4 * loss.detach().where(quarter == q, 0.0).mean()
        return StepOutput(loss.mean(), metrics)

    def noised(self, batch: Batch, ctx: StepContext) -> tuple[Tensor, Level, Tensor, Tensor]:
        """Quantile [B] and noise level of each sample, its noised image and the noise, float32[B,C,H,W]."""
        quantile = ctx.random(batch, "ddpm.level").uniform(1)[:, 0]
        noise = ctx.random(batch, "ddpm.noise").normal(*batch["image"].shape[1:])
        level = self.process.draw(quantile)
        return quantile, level, add_noise(to_model(batch["image"]), noise, level), noise

    def _conditions(self, batch: Batch, ctx: StepContext, level: Level) -> Conditions:
        label = dropout = None
        if self.classes:
            if not self._labels_checked:  # once: it waits for the device
                self._check_labels(batch["label"])
            dropped = ctx.random(batch, "ddpm.drop").uniform(1)[:, 0] < self.config.drop_condition
            label = batch["label"].where(~dropped, self.classes) if ctx.training else batch["label"]
        if self.config.network.dropout > 0 and self.training:
            dropout = ctx.random(batch, "ddpm.dropout").integers(0, 2**31, self.dropouts)
        return Conditions(level.time, label, dropout=dropout)

    def _check_labels(self, label: Tensor) -> None:
        low, high = int(label.min()), int(label.max())
        if low < 0 or high >= self.classes:
            raise DataError(
                f"labels run from {low} to {high}, but the manifest names {self.classes} classes "
                f"(0 to {self.classes - 1}); rebuild the shards or mend the manifest's classes"
            )
        self._labels_checked = True

    def _bound(self, image: Tensor, x: Tensor, quantile: Tensor, level: Level, answer: Tensor, part: Tensor) -> Tensor:
        """The bound in bits per dimension as one level estimates it: its term times the number of levels; [B].

        Only the variance learns from it: the mean is held fixed (Nichol and Dhariwal, section 3.1).
        """
        assert isinstance(self.process, Discrete)
        levels, index = self.process.levels, self.process.index(quantile)
        predicted = targets.to_image(self.config.target, answer.detach(), x, level)
        log = samplers.log_variance(levels, index, "learned", part, x)
        return (likelihood.term(image, x, levels, index, predicted, log) * len(levels)).float()

    def generator(self) -> Generator:
        """What makes images."""
        return Generator(
            self.denoiser, self.process, self.image_shape, self.classes, self.config.variance, self.config.sampler
        )

    def encoders(self) -> dict[str, nn.Module]:
        """ "image" is a block's output at a little noise; "generator" makes images and measures likelihood."""
        features = DenoiserFeatures(
            self.denoiser, self.process, self.config.feature_block, self.config.feature_noise, self.classes
        )
        return {"image": features, "generator": self.generator()}

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """Samples from the same noise every time, how one row of them came about, and what guidance does."""
        was_training = self.training
        self.eval()
        ids = torch.arange(4 * SHOWN, device=batch["image"].device)
        label = ids % self.classes if self.classes else None
        generator, seen = self.generator(), []
        samples = to_pixels(generator.sample(ids, label, ctx.seed))
        first = None if label is None else label[:SHOWN]
        generator.sample(ids[:SHOWN], first, ctx.seed, watch=lambda image: seen.append(to_pixels(image)))
        moments = torch.linspace(0, len(seen) - 1, MOMENTS).round().long().tolist()
        said = self.config.sampler
        pictures = {
            "samples": Picture(tile(list(samples.split(SHOWN))), f"Samples: {said.name}, {said.steps} steps"),
            "trajectory": Picture(
                tile([seen[m] for m in moments]), "Expected image, from pure noise down to the sample"
            ),
        }
        if self.classes:
            rows = [
                to_pixels(generator.sample(ids[:SHOWN], first, ctx.seed, said.model_copy(update={"guidance": scale})))
                for scale in SWEEP
            ]
            scales = ", ".join(f"{scale:g}" for scale in SWEEP)
            pictures["guidance"] = Picture(tile(rows), f"The same noise and classes with guidance {scales}")
        self.train(was_training)
        return pictures


def _process(config: Config) -> Process:
    if config.schedule == "lognormal":
        return LogNormal(config.sigma_mean, config.sigma_std)
    return Discrete(schedule(config.schedule, config.steps, zero_terminal_snr=config.zero_terminal_snr))
