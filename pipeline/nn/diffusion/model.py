"""A network with what its answer means: a denoiser; with a sampler: a generator; with a tap: an encoder.

Classifier-free guidance: Ho and Salimans 2022 (arXiv 2207.12598), with scale 1 for none; in an interval of noise:
Kynkaanniemi et al. 2024 (2404.07724); rescaled: Lin et al. 2023 (2305.08891), section 3.4. Features: Xiang et al. 2023
(2303.09769). Shape letters: B samples, C channels, H height, W width, T levels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError, NonFiniteError
from pipeline.core.random import SampleRandom
from pipeline.nn.conditioning import Conditions
from pipeline.nn.diffusion import likelihood, samplers
from pipeline.nn.diffusion.levels import Level, Spacing, add_noise
from pipeline.nn.diffusion.process import Process
from pipeline.nn.diffusion.samplers import Denoised, Variance
from pipeline.nn.diffusion.targets import Target, to_image, to_input


class SamplerConfig(Strict):
    """How samples are made."""

    name: Literal["ancestral", "ddim", "dpm_solver", "heun"] = "dpm_solver"
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
    clip: bool = True
    """Clip the expected image of every step to what pixels can be."""


def to_model(image: Tensor) -> Tensor:
    """uint8[B,C,H,W] to float32 from -1 to 1."""
    return image.float() / 127.5 - 1


def to_pixels(x: Tensor) -> Tensor:
    """From -1 to 1 to uint8, rounded to the nearest."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class Denoiser(nn.Module):
    """A network and the meaning of its answer.

    Args:
        network: (x, conditions) to [B,C,H,W], or [B,2C,H,W] with a learned variance; with its ``taps`` and ``walk``.
        target: what it answers.
        learned_variance: its second half says where the reverse variance lies.
    """

    def __init__(self, network: nn.Module, target: Target, learned_variance: bool) -> None:
        super().__init__()
        self.network = network
        self.target: Target = target
        self.learned_variance = learned_variance

    def forward(self, x: Tensor, level: Level, given: Conditions) -> tuple[Tensor, Tensor | None]:
        """The answer to noised images, and the variance's place from 0 to 1; both at least float32[B,C,H,W]."""
        answer = self.network(to_input(self.target, x, level).float(), given)
        if not self.learned_variance:
            return answer, None
        answer, part = answer.chunk(2, dim=1)
        return answer, (part + 1) / 2

    def denoise(self, x: Tensor, level: Level, label: Tensor | None) -> Denoised:
        """The expected images of ``x`` [B,C,H,W], which are all at the same level or each at its own."""
        time = level.time.to(x.device).expand(len(x))
        answer, part = self(x, level, Conditions(time, label))
        return Denoised(to_image(self.target, answer.to(x.dtype), x, level), part)


class Generator(nn.Module):
    """A denoiser that makes images and says how likely they are. Shares the denoiser.

    Args:
        denoiser: the network; should be in eval mode.
        process: the noise levels that it was trained on.
        image_shape: C, H, W.
        classes: number of classes; 0: none.
        variance: of the reverse process.
        sampler: how samples are made where nothing else is said.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        process: Process,
        image_shape: tuple[int, int, int],
        classes: int,
        variance: Variance,
        sampler: SamplerConfig,
    ) -> None:
        super().__init__()
        self.denoiser, self.process, self.image_shape = denoiser, process, image_shape
        self.classes, self.sampler = classes, sampler
        self.variance: Variance = variance

    def sample(
        self,
        ids: Tensor,
        label: Tensor | None,
        seed: int,
        config: SamplerConfig | None = None,
        watch: Callable[[Tensor], None] = lambda image: None,
    ) -> Tensor:
        """Make one image for each id; the same id and seed give the same image in any batch.

        Args:
            ids: int64[B], on the device to compute on.
            label: int64[B], the class of each; None where the generator has none, or for none.
            seed: of the noise.
            config: how.
            watch: is shown the expected images of each evaluation, [B,C,H,W].

        Returns:
            float64[B,C,H,W], about -1 to 1.

        Raises:
            ConfigError: guidance without classes, labels that there are not, a sampler that does not fit the process.
            NonFiniteError: a sample is not finite.
        """
        config = config or self.sampler
        label = self._check(config, label, len(ids), ids.device)
        random = SampleRandom(seed, "diffusion.sample", torch.zeros_like(ids), ids)
        levels = self.process.chain(config.steps, config.spacing)

        def noise() -> Tensor:
            return random.normal(*self.image_shape).double()

        def denoise(x: Tensor, level: Level) -> Denoised:
            found = self._guided(x, level, label, config)
            image = found.image.clamp(-1, 1) if config.clip else found.image
            watch(image)
            return found._replace(image=image)

        if config.name == "ancestral":
            x = samplers.ancestral(noise(), levels, denoise, noise, variance=self.variance)
        elif config.name == "ddim":
            x = samplers.ddim(noise(), levels, denoise, noise, eta=config.eta)
        elif config.name == "dpm_solver":
            x = samplers.dpm_solver(noise(), levels, denoise)
        else:
            x = samplers.heun(noise(), levels, denoise)
        if not x.isfinite().all():
            bad = ids[~x.flatten(1).isfinite().all(dim=1)].tolist()
            raise NonFiniteError(f"sample {bad[0]} (one of {len(bad)}) is not finite; the network has diverged")
        return x

    def _check(self, config: SamplerConfig, label: Tensor | None, count: int, device: torch.device) -> Tensor | None:
        if self.classes == 0:
            if config.guidance != 1:
                raise ConfigError(
                    f"guidance = {config.guidance}: this model was trained without classes, so there is nothing to "
                    'guide it by; leave guidance out, or train with condition = "class"'
                )
            if label is not None:
                raise ConfigError('classes are asked of a model trained without; train with condition = "class"')
            return None
        if label is None:
            return torch.full((count,), self.classes, device=device)
        low, high = int(label.min()), int(label.max())
        if low < 0 or high > self.classes:
            raise ConfigError(f"class {low if low < 0 else high} is asked for; the model knows 0 to {self.classes - 1}")
        return label

    def _guided(self, x: Tensor, level: Level, label: Tensor | None, config: SamplerConfig) -> Denoised:
        """Away from the image that is expected without a class; the variance is the class's."""
        sigma = float(level.sigma)
        inside = config.guidance_from <= sigma and (config.guidance_to is None or sigma <= config.guidance_to)
        if label is None or config.guidance == 1 or not inside:
            return self.denoiser.denoise(x, level, label)
        both = torch.cat([label, torch.full_like(label, self.classes)])
        image, part = self.denoiser.denoise(torch.cat([x, x]), level, both)
        told, free = image.chunk(2)
        guided = torch.lerp(free, told, config.guidance)
        if config.guidance_rescale > 0:
            ratio = _std(told) / _std(guided)
            guided = guided * (1 + config.guidance_rescale * (ratio - 1))
        return Denoised(guided, None if part is None else part.chunk(2)[0])

    def bits(self, image: Tensor, ids: Tensor, label: Tensor | None, seed: int, steps: int | None) -> Tensor:
        """The bound on each image's information, term by term; with one fresh noise per term.

        Args:
            image: uint8[B,C,H,W].
            ids: int64[B], numbers of the samples; they fix the noise.
            label: int64[B], or None.
            seed: of the noise.
            steps: of a continuous process.

        Returns:
            float64[B,T+1] in bits per dimension: the decoder's, those of the levels 1 to T-1, the prior's.
        """
        levels = self.process.likelihood_chain(steps)
        label = self._check(SamplerConfig(), label, len(ids), ids.device)
        random = SampleRandom(seed, "diffusion.bits", torch.zeros_like(ids), ids)
        clean = to_model(image)
        terms = []
        for i in range(len(levels)):
            index = torch.full_like(ids, i)
            level = levels.at(index)
            x = add_noise(clean, random.normal(*self.image_shape), level)
            found = self.denoiser.denoise(x, level, label)
            log = samplers.log_variance(levels, index, self.variance, found.log_variance_part, x)
            terms.append(likelihood.term(clean, x, levels, index, found.image.clamp(-1, 1), log))
        return torch.stack([*terms, likelihood.prior(clean, levels)], dim=1)


def _std(image: Tensor) -> Tensor:
    return image.flatten(1).std(dim=1).view(-1, 1, 1, 1)


class DenoiserFeatures(nn.Module):
    """uint8[B,C,H,W] to float[B,D]: noise the images a little, and take the mean of a block's output over places.

    Every image is given the same noise, so that features are a function of the image alone.

    Args:
        denoiser: shared.
        process: the noise levels that it was trained on.
        block: one of ``denoiser.network.taps``.
        quantile: noise level, 0 the cleanest to 1 the noisiest.
        classes: number of classes; it is told none of them. 0: none.

    Raises:
        ConfigError: no such block.
    """

    def __init__(self, denoiser: Denoiser, process: Process, block: str, quantile: float, classes: int) -> None:
        super().__init__()
        taps: dict[str, int] = denoiser.network.taps  # pyright: ignore[reportAssignmentType]
        if block not in taps:
            raise ConfigError(f"there is no block {block!r} to take features from; there are {', '.join(taps)}")
        self.denoiser, self.process, self.block, self.quantile = denoiser, process, block, quantile
        self.classes, self.dim = classes, taps[block]

    def forward(self, image: Tensor) -> Tensor:
        """Features of a batch, at least float32."""
        clean = to_model(image)
        zeros = torch.zeros(1, dtype=torch.int64, device=image.device)
        noise = SampleRandom(0, "diffusion.features", zeros, zeros).normal(*clean.shape[1:])
        level = self.process.draw(torch.full((len(clean),), self.quantile, device=image.device))
        x = add_noise(clean, noise, level)
        label = zeros.new_full((len(clean),), self.classes) if self.classes else None
        for name, h in self.denoiser.network.walk(  # pyright: ignore[reportCallIssue]
            to_input(self.denoiser.target, x, level).float(), Conditions(level.time, label)
        ):
            if name == self.block:
                return h.mean(dim=(2, 3)).to(torch.promote_types(h.dtype, torch.float32))
        raise AssertionError(self.block)
