"""Denoising diffusion: noise images, and learn to say what they were; sampling walks the noise back.

Ho et al., "Denoising Diffusion Probabilistic Models" (NeurIPS 2020), https://arxiv.org/abs/2006.11239; learned
variance, hybrid loss and importance-sampled levels of Nichol and Dhariwal 2021 (2102.09672); continuous levels of
Karras et al. 2022 (2206.00364); a learned schedule of Kingma et al. 2021 (2107.00630); flow matching of Lipman et al.
2023 (2210.02747) as Ma et al. 2024 (2401.08740) have it; on latents, as Rombach et al. 2022 (2112.10752); drawn to an
encoder's patches, as Yu et al. 2024 (2410.06940).
Shape letters: B samples, C channels, H height, W width (of latents, where these are diffused), L tokens.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.config.durations import Duration
from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError
from pipeline.core.protocols import (
    Batch,
    Clock,
    DataFacts,
    Export,
    Objective,
    Origin,
    Picture,
    StepContext,
    StepOutput,
    Survey,
)
from pipeline.dist.collectives import all_gather
from pipeline.nn.conditioning import Prompt, Text, TextConfig, TextReader, Told
from pipeline.nn.diffusion import exchange, likelihood, samplers, targets
from pipeline.nn.diffusion.alignment import AlignConfig, Alignment, Caught
from pipeline.nn.diffusion.features import DenoiserFeatures
from pipeline.nn.diffusion.importance import Importance
from pipeline.nn.diffusion.levels import Level, add_noise, schedule
from pipeline.nn.diffusion.model import Denoiser, Generator, SamplerConfig
from pipeline.nn.diffusion.process import Discrete, Learned, LogNormal, Process, Scheduled, Straight
from pipeline.nn.diffusion.samplers import Variance
from pipeline.nn.diffusion.space import LatentConfig, Latents, Pixels, Space
from pipeline.nn.diffusion.targets import Target, Weight
from pipeline.nn.dit import DiT, DiTConfig
from pipeline.nn.dropout import dropping_for
from pipeline.nn.images import tile
from pipeline.nn.labels import check_labels
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
    schedule: Literal["linear", "cosine", "sigmoid", "lognormal", "flow", "learned"] = "linear"
    """Of a discrete process; or a continuous one, "lognormal" EDM's, "flow" a straight line, "learned" VDM's."""
    steps: Annotated[int, Field(ge=2)] = 1000
    """Levels of a discrete process."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that its last level is pure noise."""
    sigma_mean: float = -1.2
    """Of ln(sigma), "lognormal" only."""
    sigma_std: Annotated[float, Field(gt=0)] = 1.2
    target: Target = "noise"
    weight: Weight | Literal["bound"] = "uniform"
    """Of the squared error; "bound": the loss is the variational bound in bits per dimension instead."""
    min_snr_gamma: Annotated[float, Field(gt=0)] = 5.0
    draw: Literal["uniform", "importance"] = "uniform"
    """How levels of a discrete process are drawn; "importance": where the loss is large, at equal expectation."""
    variance: Variance = "large"
    """Of the reverse process; "learned" is trained by the bound."""
    hybrid_weight: Annotated[float, Field(gt=0)] = 0.001
    """Of the bound, summed over the levels, beside the squared error."""
    condition: Literal["none", "class", "text"] = "none"
    text: TextConfig = TextConfig()
    """Of condition = "text": the encoder whose tokens the U-Net attends to."""
    drop_condition: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Part of the samples that are not told their class or text, so that guidance has something to start from."""
    channels: Annotated[int, Field(ge=1)] = 3
    sampler: SamplerConfig = SamplerConfig()
    """Of the showcase, and of evaluations that do not say otherwise."""
    feature_block: str = "middle_1"
    """Block whose output is the image's features."""
    feature_noise: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Quantile of the noise levels at which features are taken."""
    latent: LatentConfig | None = None
    """An autoencoder whose latents are diffused in place of pixels."""
    compile: bool = False
    """Compile each block of the network with torch.compile; but one that is aligned."""
    align: AlignConfig | None = None
    """An encoder that a block of a transformer is drawn to (REPA)."""

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.schedule in ("lognormal", "flow", "learned"):
            self._fits_continuous()
        elif self.zero_terminal_snr and self.target == "noise":
            raise ValueError(
                "with zero_terminal_snr the last level has no signal, so the image cannot be read from the noise; "
                'set target = "velocity"'
            )
        if self.condition == "text" and isinstance(self.network, DiTConfig):
            raise ValueError('condition = "text" needs attention from places to tokens; set network.name = "unet"')
        if self.latent is not None and (self.weight == "bound" or self.variance == "learned"):
            raise ValueError(
                "the variational bound ends in the probabilities of pixels' values, which latents have not got; with "
                '"latent" leave out weight = "bound" and variance = "learned"'
            )
        return self

    def _fits_continuous(self) -> None:
        for wrong, setting in (
            (self.zero_terminal_snr, "zero_terminal_snr"),
            (self.variance == "learned", 'variance = "learned"'),
            (self.draw == "importance", 'draw = "importance"'),
        ):
            if wrong:
                raise ValueError(f'{setting} needs a discrete schedule, not "{self.schedule}"; leave it out')
        if self.schedule == "flow" and self.target == "noise":
            raise ValueError(
                'the straight line of schedule = "flow" ends in pure noise, from which no image can be read; '
                'set target = "flow"'
            )
        if (self.schedule == "learned") != (self.weight == "bound") or (
            self.schedule == "learned" and self.target != "noise"
        ):
            raise ValueError(
                'schedule = "learned" is trained by the bound on the noise: it goes with weight = "bound" and '
                'target = "noise"; among continuous schedules, weight = "bound" goes with it alone'
            )


class Noised(NamedTuple):
    """A batch on its way to the denoiser."""

    quantile: Tensor
    """Of the noise level, [B]."""
    level: Level
    x: Tensor
    """Noised, float32[B,C,H,W]."""
    noise: Tensor
    """float32[B,C,H,W]."""
    factor: Tensor
    """Of the loss, float64[B], for levels that were drawn more often than others."""
    learned: Scheduled | None
    clean: Tensor
    """Images, or latents: float32[B,C,H,W]."""


class DDPM(Objective):
    """The denoiser and how it is trained."""

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        self.config = config
        self.needs = {"image": f"uint8[B,{config.channels},H,W]"} | _fields(config, facts)
        self.image_shape = (config.channels, *facts.image_size)
        self.space: Space = (
            Pixels(self.image_shape) if config.latent is None else Latents(config.latent, self.image_shape)
        )
        self.process = _process(config)
        self.importance = None
        if config.draw == "importance":
            assert isinstance(self.process, Discrete)
            self.importance = Importance(len(self.process.levels))
        self._fresh: list[Tensor] = []
        self.denoiser = _denoiser(config, facts, self.space.shape)
        self.alignment = (
            None if config.align is None else Alignment(config.align, self.denoiser.network, facts.image_size)
        )
        self._names, self._labels_checked = facts.classes, False
        # Mistakes in the sampler and in feature_block are found before training.
        self.generator().chain(config.sampler)
        self.encoders()

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """Weighted squared error of the target; "loss_q0" to "loss_q3" are its means over quarters of the levels.

        A quarter's mean is taken as four times the mean of what falls into it, which is right in expectation and
        stays a mean over samples, however they are spread over ranks and micro-batches.
        """
        own = self.noised(batch, ctx)
        image, align, told = own.clean, self.alignment, self._told(batch, ctx)
        dropping = dropping_for(batch, ctx) if ctx.training else nullcontext()
        with dropping, nullcontext([]) if align is None else Caught(self.denoiser.network, align.number) as tokens:
            answer, part = self.denoiser(own.x, own.level, told)
        aim = targets.of_training(self.config.target, image, own.noise, own.x, own.level)
        error = (answer - aim).square().flatten(1).mean(dim=1)
        metrics = {"mse": (error.detach() * own.factor).float().mean()}
        if own.learned is not None:
            loss = self._continuous_bound(batch, ctx, image, error, own.learned)
        elif self.config.weight == "bound":
            loss = self._bound(image, own, answer, part)
        else:
            weight = targets.weight(self.config.weight, self.config.target, own.level, self.config.min_snr_gamma)
            loss = error * weight.float()
            if part is not None:
                # Only the variance learns from it: the mean is held fixed (Nichol and Dhariwal, section 3.1).
                bound = self._bound(image, own, answer.detach(), part)
                metrics["bound"] = (bound.detach() * own.factor).float().mean()
                loss = loss + self.config.hybrid_weight * bound
        if self.importance is not None and self.training:
            level = (own.quantile * len(self.importance.seen)).long()
            self._fresh.append(torch.stack([batch["id"].double(), level.double(), loss.detach().double()], dim=1))
        loss = (loss * own.factor).float()
        if align is not None:
            aligned = align(batch["image"], tokens[0])
            metrics["align"] = aligned.detach().mean()
            loss = loss + align.config.weight * aligned
        quarter = (own.quantile * 4).long()
        for q in range(4):
            metrics[f"loss_q{q}"] = 4 * loss.detach().where(quarter == q, 0.0).mean()
        return StepOutput(loss.mean(), metrics, loss.detach())

    def noised(self, batch: Batch, ctx: StepContext) -> Noised:
        """The images of a batch, each with a noise level and noise of its own."""
        quantile = ctx.random(batch, "ddpm.level").uniform(1)[:, 0]
        clean = self.space.clean(batch["image"], ctx.random(batch, "ddpm.latent"))
        noise = ctx.random(batch, "ddpm.noise").normal(*clean.shape[1:])
        factor, learned = torch.ones_like(quantile, dtype=torch.float64), None
        if self.importance is not None:
            quantile, factor = self.importance.draw(quantile)
        if isinstance(self.process, Learned):
            learned = self.process.training_levels(quantile)
            level = learned.level
        else:
            level = self.process.draw(quantile)
        return Noised(quantile, level, add_noise(clean, noise, level), noise, factor, learned, clean)

    def frozen(self) -> Mapping[str, Origin]:
        """The autoencoder of latents, and the encoder that a block is drawn to."""
        found = {} if isinstance(self.space, Pixels) else {"space.autoencoder": self.space.autoencoder.origin}
        return found if self.alignment is None else found | {"alignment.teacher": self.alignment.origin}

    def surveys(self) -> Mapping[str, Survey]:
        """The scale of latents, once."""
        measured = isinstance(self.space, Latents) and self.space.measured
        return {"scale": Survey(Duration(100, "%"))} if measured else {}

    def look(self, survey: str, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """Moments of latents."""
        assert isinstance(self.space, Latents)
        return self.space.look(batch, ctx)

    def surveyed(self, survey: str, rows: dict[str, Tensor], ctx: StepContext) -> None:
        """Their scale."""
        assert isinstance(self.space, Latents)
        self.space.surveyed(rows)

    def _told(self, batch: Batch, ctx: StepContext) -> Told:
        """What the network is told of each sample; in training, nothing of some."""
        if not self.denoiser.conditional:
            return Told()
        dropped = ctx.random(batch, "ddpm.drop").uniform(1)[:, 0] < self.config.drop_condition
        dropped &= ctx.training
        if self.denoiser.reader is not None:
            return self.denoiser.reader(Text(batch["text"], batch["text_length"].where(~dropped, 0)))
        if not self._labels_checked:  # once: it waits for the device
            check_labels(batch["label"], self._names)
            self._labels_checked = True
        return Told(batch["label"].where(~dropped, self.denoiser.classes))

    def _bound(self, image: Tensor, own: Noised, answer: Tensor, part: Tensor | None) -> Tensor:
        """The bound in bits per dimension as one level estimates it: its term times the number of levels; [B]."""
        assert isinstance(self.process, Discrete)
        levels, index = self.process.levels, self.process.index(own.quantile)
        predicted = targets.to_image(self.config.target, answer, own.x, own.level)
        log = samplers.log_variance(levels, index, self.config.variance, part, own.x)
        return (likelihood.term(image, own.x, levels, index, predicted, log) * len(levels)).float()

    def _continuous_bound(
        self, batch: Batch, ctx: StepContext, image: Tensor, error: Tensor, learned: Scheduled
    ) -> Tensor:
        """The bound in bits per dimension in continuous time; [B]."""
        noise = ctx.random(batch, "ddpm.decoder").normal(*image.shape[1:])
        bound = likelihood.continuous(image, noise, error, learned.slope, learned.first, learned.last)
        learned.loss.append(bound.detach())
        return bound

    def after_step(self, clock: Clock) -> None:
        """The losses of all ranks decide which levels are drawn next."""
        if self.importance is not None:
            rows = all_gather(torch.cat(self._fresh))
            self.importance.learn(rows[:, 0], rows[:, 1].long(), rows[:, 2])
            self._fresh = []

    def generator(self) -> Generator:
        """What makes images."""
        own = self.config
        return Generator(self.denoiser, self.process, self.image_shape, own.variance, own.sampler, self.space)

    def encoders(self) -> dict[str, nn.Module]:
        """ "image" is a block's output at a little noise; "generator" makes images and measures likelihood."""
        features = DenoiserFeatures(
            self.denoiser, self.process, (self.config.feature_block,), self.config.feature_noise, self.space
        )
        return {"image": features, "generator": self.generator()}

    def exports(self) -> dict[str, Export]:
        """The model for diffusers, which reads a folder of weights and configuration."""
        return exchange.offered(self.denoiser, self.process, self.space.shape, self.config.variance)

    def inputs(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """The image, and with the noise of its level; latents would be seen by a decoder that a run has yet to fill."""
        noised = {"noised": self.space.image(self.noised(batch, ctx).x)} if self.space.bounded else {}
        return {"image": batch["image"]} | noised

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """Samples from the same noise every time, how one row of them came about, and what guidance does."""
        was_training = self.training
        self.eval()
        ids = torch.arange(4 * SHOWN, device=batch["image"].device)
        prompt, generator, seen = self._prompt(batch, ids), self.generator(), []
        samples = generator.sample(ids, prompt, ctx.seed, watch=lambda image: seen.append(image[:SHOWN]))
        moments = torch.linspace(0, len(seen) - 1, MOMENTS).round().long().tolist()
        said = self.config.sampler
        pictures = {
            "samples": Picture(
                tile(list(self.space.image(samples).split(SHOWN))), f"Samples: {said.name}, {said.steps} steps"
            ),
            "trajectory": Picture(
                tile([self.space.image(seen[m]) for m in moments]), "Expected image, from pure noise down to the sample"
            ),
        }
        if self.denoiser.conditional and not self.denoiser.always_told:
            first = self._prompt(batch, ids[:SHOWN])
            rows = [
                self.space.image(generator.sample(ids[:SHOWN], first, ctx.seed, how))
                for how in (said.model_copy(update={"guidance": scale}) for scale in SWEEP)
            ]
            scales = ", ".join(f"{scale:g}" for scale in SWEEP)
            pictures["guidance"] = Picture(tile(rows), f"The same noise and conditions with guidance {scales}")
        self.train(was_training)
        return pictures

    def _prompt(self, batch: Batch, ids: Tensor) -> Prompt | None:
        """Of the showcase: all classes in turn, or the texts of the batch in turn."""
        if self.denoiser.reader is not None:
            row = ids % len(batch["text"])
            return Text(batch["text"][row], batch["text_length"][row])
        return ids % self.denoiser.classes if self.denoiser.classes else None


def _fields(config: Config, facts: DataFacts) -> dict[str, str]:
    """What a batch must hold beside the image."""
    if config.condition == "text":
        return {"text": f"int64[B,{config.text.length}]", "text_length": "int64[B]"}
    if config.condition == "none":
        return {}
    if not facts.classes:
        raise ConfigError(
            'objective.condition = "class": the data set has no classes; build it from a source with labels, '
            'or set condition = "none"'
        )
    return {"label": "int64[B]"}


def _process(config: Config) -> Process:
    if config.schedule == "lognormal":
        return LogNormal(config.sigma_mean, config.sigma_std)
    if config.schedule == "flow":
        return Straight()
    if config.schedule == "learned":
        return Learned()
    return Discrete(schedule(config.schedule, config.steps, zero_terminal_snr=config.zero_terminal_snr))


def _denoiser(config: Config, facts: DataFacts, space: tuple[int, int, int]) -> Denoiser:
    """The network with its reader of texts, if there is one; of what has the shape ``space``."""
    learned = config.variance == "learned"
    out = space[0] * (2 if learned else 1)
    classes = len(facts.classes) if config.condition == "class" else 0
    reader = TextReader(config.text) if config.condition == "text" else None
    shape = {"channels": space[0], "out": out, "classes": classes}
    if isinstance(config.network, UNetConfig):
        width = None if reader is None else config.text.width
        network = UNet(config.network, space[1:], **shape, token_width=width)
    else:
        network = DiT(config.network, space[1:], **shape)
    if config.compile:
        for name, block in zip(network.taps, network.blocks, strict=True):
            if config.align is None or name != config.align.block:
                block.compile()
    always_told = config.drop_condition == 0
    if always_told and network.embedding.label is not None:
        # Features are taken without a class. Its row is never trained then, and zero is nearer to the classes' mean.
        nn.init.zeros_(network.embedding.label.weight[-1])
    return Denoiser(network, config.target, learned, classes, reader, always_told=always_told)
