"""A network with what its answer means: a denoiser; with a sampler: a generator.

Classifier-free guidance: Ho and Salimans 2022 (arXiv 2207.12598), with scale 1 for none; in an interval of noise:
Kynkaanniemi et al. 2024 (2404.07724); rescaled: Lin et al. 2023 (2305.08891), section 3.4.
Shape letters: B samples, C channels, H height, W width, T levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.config.mistakes import validate
from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError, NonFiniteError
from pipeline.core.evaluation import Bits
from pipeline.core.protocols import Batch
from pipeline.core.random import SampleRandom
from pipeline.nn.conditioning import Conditions, Prompt, Text, TextReader, Told, prompt_of
from pipeline.nn.diffusion import likelihood, samplers
from pipeline.nn.diffusion.levels import Level, Levels, Spacing, add_noise
from pipeline.nn.diffusion.process import Discrete, Process, Straight
from pipeline.nn.diffusion.samplers import Denoised, Variance
from pipeline.nn.diffusion.space import Pixels, Space, refuse_likelihood, to_model
from pipeline.nn.diffusion.targets import Target, to_image, to_input

AHEAD = 2**15
"""Numbers of noise that are drawn for a sample at a time on an accelerator, where a draw is some 300 small kernels."""


class SamplerConfig(Strict):
    """How samples are made."""

    name: Literal["ancestral", "ddim", "dpm_solver", "heun"] = "dpm_solver"
    """On flow matching's straight line, DDIM's step is Euler's and Heun walks the line itself."""
    steps: Annotated[int, Field(ge=2)] = 50
    """Levels visited; evaluations of the network, but for Heun, which needs 2 steps - 1."""
    spacing: Spacing = "trailing"
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """DDIM's noise: 0 none, 1 as much as ancestral sampling."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """1: the class as it is, without guidance; 0: as if no class were asked for."""
    guidance_from: Annotated[float, Field(ge=0)] = 0.0
    """Smallest sigma with guidance."""
    guidance_to: Annotated[float, Field(gt=0)] | None = None
    """Largest sigma with guidance; left out: no limit."""
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How far the guided image's standard deviation is brought back to that of the image without guidance."""
    clip: bool | None = None
    """Clip the expected image of every step to what pixels can be; left out: of pixels so, of latents not."""


class Denoiser(nn.Module):
    """A network and the meaning of its answer.

    Args:
        network: (x, conditions) to [B,C,H,W], or [B,2C,H,W] with a learned variance; with its ``taps`` and ``walk``.
        target: what it answers.
        learned_variance: its second half says where the reverse variance lies.
        classes: that it may be told; 0: none.
        reader: of the texts that it may be told; None: none.
        always_told: it was never trained without a class or text, so that there is nothing to guide it away from.
    """

    def __init__(
        self,
        network: nn.Module,
        target: Target,
        learned_variance: bool,
        classes: int = 0,
        reader: TextReader | None = None,
        *,
        always_told: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.reader = network, reader
        self.target: Target = target
        self.learned_variance, self.classes, self.always_told = learned_variance, classes, always_told

    def forward(self, x: Tensor, level: Level, told: Told) -> tuple[Tensor, Tensor | None]:
        """The answer to noised images, and the variance's place from 0 to 1; both at least float32[B,C,H,W]."""
        answer = self.network(to_input(self.target, x, level).float(), Conditions(level.time, told))
        if not self.learned_variance:
            return answer, None
        answer, part = answer.chunk(2, dim=1)
        return answer, (part + 1) / 2

    def denoise(self, x: Tensor, level: Level, told: Told) -> Denoised:
        """The expected images of ``x`` [B,C,H,W], which are all at the same level or each at its own."""
        time = level.time.to(x.device).expand(len(x))
        answer, part = self(x, level._replace(time=time), told)
        return Denoised(to_image(self.target, answer.to(x.dtype), x, level), part)

    @property
    def conditional(self) -> bool:
        """Whether it can be told anything."""
        return self.classes > 0 or self.reader is not None

    def read(self, prompt: Prompt | None, count: int, device: torch.device) -> Told:
        """What the network is told for ``prompt``, of ``count`` images; None stands for no class and no text.

        Raises:
            ConfigError: the model was not trained for it, or knows no such class.
        """
        if prompt is not None and isinstance(prompt, Text) != (self.reader is not None):
            raise ConfigError(
                f"{'texts' if isinstance(prompt, Text) else 'classes'} are asked of a model trained without; train "
                f'with condition = "{"text" if isinstance(prompt, Text) else "class"}"'
            )
        if self.reader is not None:
            nothing = torch.zeros(count, 1, dtype=torch.int64, device=device)
            return self.reader(prompt if isinstance(prompt, Text) else Text(nothing, nothing[:, 0]))
        if self.classes == 0:
            if prompt is not None:
                raise ConfigError('classes are asked of a model trained without; train with condition = "class"')
            return Told()
        if not isinstance(prompt, Tensor):
            return Told(torch.full((count,), self.classes, device=device))
        low, high = int(prompt.min()), int(prompt.max())
        if low < 0 or high > self.classes:
            raise ConfigError(f"class {low if low < 0 else high} is asked for; the model knows 0 to {self.classes - 1}")
        return Told(prompt)


class Generator(nn.Module):
    """A denoiser that makes images and says how likely they are. Shares the denoiser.

    Args:
        denoiser: the network; should be in eval mode.
        process: the noise levels that it was trained on.
        image_shape: C, H, W.
        variance: of the reverse process.
        sampler: how samples are made where nothing else is said.
        space: what is diffused; None: pixels.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        process: Process,
        image_shape: tuple[int, int, int],
        variance: Variance,
        sampler: SamplerConfig,
        space: Space | None = None,
    ) -> None:
        super().__init__()
        self.denoiser, self.process, self.image_shape = denoiser, process, image_shape
        self.space: Space = space or Pixels(image_shape)
        self.sampler = sampler
        self.variance: Variance = variance

    @property
    def classes(self) -> int:
        """Number of classes; 0: none."""
        return self.denoiser.classes

    @property
    def told(self) -> Literal["label", "text"] | None:
        """The field that it is told of an image."""
        return "text" if self.denoiser.reader is not None else "label" if self.classes else None

    def settings(self, values: Mapping[str, Any]) -> SamplerConfig:
        """A sampler that this model can follow; {}: that of the showcase.

        Raises:
            ConfigError: with every mistake, or what ``chain`` raises.
        """
        config = validate(SamplerConfig, values, "sampler") if values else self.sampler
        self.chain(config)
        return config

    def make(self, ids: Tensor, prompt: Batch, seed: int, settings: SamplerConfig) -> Tensor:
        """Images uint8[B,C,H,W] for ids int64[B]; see :class:`pipeline.core.evaluation.Maker`."""
        return self.space.image(self.sample(ids, prompt_of(prompt), seed, settings), ids)

    def chain(self, config: SamplerConfig) -> Levels:
        """The levels that ``config`` visits.

        Raises:
            ConfigError: this model cannot be sampled so.
        """
        if config.guidance != 1 and not self.denoiser.conditional:
            raise ConfigError(
                f"guidance = {config.guidance}: this model was trained without classes and texts, so there is nothing "
                'to guide it by; leave guidance out, or train with condition = "class" or "text"'
            )
        if config.guidance != 1 and self.denoiser.always_told:
            raise ConfigError(
                f"guidance = {config.guidance}: this model was always told its class or text, so it does not know what "
                "to be guided away from; leave guidance out, or train with drop_condition = 0.1"
            )
        if config.clip and not self.space.bounded:
            raise ConfigError("sampler.clip = true: latents have no bounds that they could be clipped to; leave it out")
        levels = self.process.chain(config.steps, config.spacing)
        if config.name == "heun" and isinstance(self.process, Discrete) and not levels.a.all():
            raise ConfigError(
                "Heun's sampler needs some signal at every noise level, and zero_terminal_snr leaves none at the last; "
                'use sampler.name = "dpm_solver" or "ddim"'
            )
        return levels

    def sample(
        self,
        ids: Tensor,
        prompt: Prompt | None,
        seed: int,
        config: SamplerConfig | None = None,
        watch: Callable[[Tensor], None] = lambda image: None,
    ) -> Tensor:
        """Make one image for each id; the same id and seed give the same image in any batch.

        Args:
            ids: int64[B], on the device to compute on.
            prompt: class or text of each; None where the generator knows none, or for none.
            seed: of the noise.
            config: how.
            watch: is shown the expected images of each evaluation, [B,C,H,W].

        Returns:
            float64[B,C,H,W], about -1 to 1; of latents [B,Z,h,w].

        Raises:
            ConfigError: classes that there are not, or what ``chain`` raises.
            NonFiniteError: a sample is not finite.
        """
        config = config or self.sampler
        levels = self.chain(config)
        told = self.denoiser.read(prompt, len(ids), ids.device)
        random = SampleRandom(seed, "diffusion.sample", torch.zeros_like(ids), ids)
        has_noise = config.name == "ancestral" or (config.name == "ddim" and config.eta > 0)
        noise = _draws(random, self.space.shape, len(levels) if has_noise else 1, ids.device).__next__
        clip = self.space.bounded if config.clip is None else config.clip

        def denoise(x: Tensor, level: Level) -> Denoised:
            found = self._guided(x, level, told, config, guided=prompt is not None)
            image = found.image.clamp(-1, 1) if clip else found.image
            watch(image)
            return found._replace(image=image)

        if config.name == "ancestral":
            x = samplers.ancestral(noise(), levels, denoise, noise, variance=self.variance)
        elif config.name == "ddim":
            x = samplers.ddim(noise(), levels, denoise, noise, eta=config.eta)
        elif config.name == "dpm_solver":
            x = samplers.dpm_solver(noise(), levels, denoise)
        else:
            x = samplers.heun(noise(), levels, denoise, straight=isinstance(self.process, Straight))
        if not x.isfinite().all():
            bad = ids[~x.flatten(1).isfinite().all(dim=1)].tolist()
            raise NonFiniteError(f"sample {bad[0]} (one of {len(bad)}) is not finite; the network has diverged")
        return x

    def _guided(self, x: Tensor, level: Level, told: Told, config: SamplerConfig, *, guided: bool) -> Denoised:
        """Away from the image that is expected of nothing told; the variance is that of what is told."""
        sigma = float(level.sigma)
        inside = config.guidance_from <= sigma and (config.guidance_to is None or sigma <= config.guidance_to)
        if not guided or config.guidance == 1 or not inside:
            return self.denoiser.denoise(x, level, told)
        image, part = self.denoiser.denoise(torch.cat([x, x]), level, told.beside_none(self.classes))
        wanted, free = image.chunk(2)
        image = torch.lerp(free, wanted, config.guidance)
        if config.guidance_rescale > 0:
            ratio = _std(wanted) / _std(image)
            image = image * (1 + config.guidance_rescale * (ratio - 1))
        return Denoised(image, None if part is None else part.chunk(2)[0])

    def bits(self, image: Tensor, ids: Tensor, prompt: Prompt | None, seed: int, steps: int | None) -> Tensor:
        """The bound on each image's information, term by term; with one fresh noise per term.

        Args:
            image: uint8[B,C,H,W].
            ids: int64[B], numbers of the samples; they fix the noise.
            prompt: class or text of each, or None.
            seed: of the noise.
            steps: of a continuous process.

        Returns:
            float64[B,T+1] in bits per dimension: the decoder's, those of the levels 1 to T-1, the prior's.
        """
        levels = self.process.likelihood_chain(steps)
        told = self.denoiser.read(prompt, len(ids), ids.device)
        random = SampleRandom(seed, "diffusion.bits", torch.zeros_like(ids), ids)
        clean = to_model(image)
        terms = []
        for i in range(len(levels)):
            index = torch.full_like(ids, i)
            level = levels.at(index)
            x = add_noise(clean, random.normal(*self.image_shape), level)
            found = self.denoiser.denoise(x, level, told)
            log = samplers.log_variance(levels, index, self.variance, found.log_variance_part, x)
            terms.append(likelihood.term(clean, x, levels, index, found.image.clamp(-1, 1), log))
        return torch.stack([*terms, likelihood.prior(clean, levels)], dim=1)

    def check_likelihood(self, steps: int | None) -> None:
        """Refuse latents, or a number of levels that the process has not.

        See :class:`pipeline.core.evaluation.Likely`.
        """
        refuse_likelihood(self.space)
        self.process.likelihood_chain(steps)

    def likelihood(self, image: Tensor, ids: Tensor, prompt: Batch, seed: int, steps: int | None) -> Bits:
        """The bound, in its three parts; see there."""
        terms = self.bits(image, ids, prompt_of(prompt), seed, steps)
        parts = {"decoder": terms[:, 0], "levels": terms[:, 1:-1].sum(dim=1), "prior": terms[:, -1]}
        return Bits("bound", parts)


def _draws(random: SampleRandom, shape: tuple[int, ...], count: int, device: torch.device) -> Iterator[Tensor]:
    """``count`` times standard normal numbers, float64[B,*shape]; the same, drawn one by one or several at once."""
    size = math.prod(shape)
    # A draw takes whole blocks of four numbers, so that only such sizes may be drawn together.
    most = max(1, AHEAD // size) if device.type == "cuda" and size % 4 == 0 else 1
    for first in range(0, count, most):
        yield from random.normal(min(most, count - first), *shape).double().unbind(1)


def _std(image: Tensor) -> Tensor:
    return image.flatten(1).std(dim=1).view(-1, 1, 1, 1)
