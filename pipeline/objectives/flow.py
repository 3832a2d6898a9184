"""Normalising flows: images as noise through an invertible network, so that their density is known exactly.

Dinh et al., "Density estimation using Real NVP" (ICLR 2017), https://arxiv.org/abs/1605.08803; Kingma and Dhariwal,
"Glow" (NeurIPS 2018, 1807.03039): ``network.name = "coupling"``. Zhai et al., "Normalizing Flows are Capable Generative
Models" (ICML 2025, 2412.06329): "transformer", with Gaussian noise in training (section 2.4) and a step towards the
clean image in sampling (section 2.5). Values are dequantised by uniform noise (Theis et al. 2016, 1511.01844), which
belongs to the sample, and the loss is bits per dimension.
Shape letters: B samples, C channels, H height, W width, D = CHW.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.durations import Duration
from pipeline.config.mistakes import validate
from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError, NonFiniteError
from pipeline.core.evaluation import Bits, bits_name
from pipeline.core.protocols import Batch, DataFacts, Objective, Picture, StepContext, StepOutput, Survey
from pipeline.core.random import SampleRandom
from pipeline.nn.generative import pixels
from pipeline.nn.generative.coupling import CouplingConfig, CouplingFlow
from pipeline.nn.generative.invertible import ActNorm, Coded
from pipeline.nn.generative.transformer_flow import TransformerConfig, TransformerFlow
from pipeline.nn.images import tile

SHOWN = 8
"""Samples in a row of the showcase."""
COOL = 0.7
"""Temperature of the showcase's second row, as the figures of Glow have it."""
STARTING = 256
"""Images that decide how actnorm begins (the authors' number)."""


class Config(Strict):
    """Settings of the flow."""

    network: CouplingConfig | TransformerConfig = CouplingConfig()
    """"coupling" or "transformer"."""
    channels: Annotated[int, Field(ge=1)] = 3
    noise: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of Gaussian noise in training, on the scale from -1 to 1; 0: values are dequantised instead.
    With noise samples look better, and bits per dimension are many more."""


class Drawing(Strict):
    """How images are made."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Standard deviation of the noise that becomes an image; the prior's is 1."""
    denoise: bool = True
    """Of a flow that was trained with noise, take away what is expected of it."""


class Flow(Objective):
    """The network and how it is trained."""

    started: Tensor
    """int64[], images that actnorm began with; 0: not yet."""

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        self.config = config
        self.needs = {"image": f"uint8[B,{config.channels},H,W]"}
        self.image_shape = (config.channels, *facts.image_size)
        self.dims = math.prod(self.image_shape)
        self.network = self._build()
        self.register_buffer("started", torch.zeros((), dtype=torch.int64))

    def _build(self) -> CouplingFlow | TransformerFlow:
        network = self.config.network
        if isinstance(network, CouplingConfig):
            return CouplingFlow(network, self.image_shape)
        return TransformerFlow(network, self.image_shape)

    def dequantised(self, image: Tensor, random: SampleRandom) -> Tensor:
        """uint8[B,C,H,W] to float32, from -1 to 1."""
        return pixels.dequantise(image, random.uniform(*self.image_shape))

    def bits(self, coded: Coded) -> Tensor:
        """Bits per dimension, [B]."""
        return pixels.bits_of_density(coded.log_density, self.dims)

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """Bits per dimension: exact, or those of images with noise."""
        if self.config.noise and ctx.training:
            noise = ctx.random(batch, "flow.noise").normal(*self.image_shape)
            x = batch["image"].float() / 127.5 - 1 + self.config.noise * noise
        else:
            x = self.dequantised(batch["image"], ctx.random(batch, "flow.dequantise"))
        coded = self.network(x)
        losses = self.bits(coded)
        name = "noised_bits_per_dim" if self.config.noise and ctx.training else bits_name("exact")
        metrics = {name: losses.detach().mean(), "log_det": coded.log_det.detach().mean() / self.dims}
        return StepOutput(losses.float().mean(), metrics, losses.detach(), coded.features.detach())

    def surveys(self) -> Mapping[str, Survey]:
        """Before the first update, of a network that begins with what depends on the images."""
        if not isinstance(self.network, CouplingFlow):
            return {}
        return {"start": Survey(Duration(100.0, "%"), samples=STARTING)}

    def look(self, survey: str, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """The images."""
        return {"image": batch["image"]}

    def surveyed(self, survey: str, rows: dict[str, Tensor], ctx: StepContext) -> None:
        """Begin every actnorm with what all ranks see of it, one after the other; once, and in float64."""
        if self.started:
            return
        ids = rows["id"]
        x = self.dequantised(rows["image"], SampleRandom(ctx.seed, "flow.start", torch.zeros_like(ids), ids))
        twin = self._build().to(x.device, torch.float64)
        twin.load_state_dict(self.network.state_dict())
        norms = [layer for layer in twin.modules() if isinstance(layer, ActNorm)]
        for layer in norms:
            layer.starting = True
        twin(x.double())
        own = (layer for layer in self.network.modules() if isinstance(layer, ActNorm))
        for layer, found in zip(own, norms, strict=True):
            layer.start_shift.copy_(found.start_shift)
            layer.start_log_scale.copy_(found.start_log_scale)
        self.started.fill_(STARTING)

    def encoders(self) -> dict[str, nn.Module]:
        """ "image" is hidden layers, pooled; "generator" makes images and knows their likelihood."""
        return {"image": Hidden(self), "generator": Generator(self)}

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """Samples, as they are and cool, and what lies between the noise of two images."""
        few, generator = {name: value[:SHOWN] for name, value in batch.items()}, Generator(self)
        ids = torch.arange(SHOWN, device=few["id"].device)
        # One sample far out in the tail is no reason to end a run: what is not finite is shown grey.
        drawn = [generator.draw(ids, ctx.seed, Drawing(temperature=warmth)) for warmth in (1.0, COOL)]
        rows = [generator.image(x.nan_to_num(0.0, 0.0, 0.0)) for x in drawn]
        noise = self.network(self.dequantised(few["image"], ctx.random(few, "flow.dequantise"))).noise
        between = generator.image(self.network.inverse(walk(noise[0], noise[-1], SHOWN)))
        return {
            "samples": Picture(tile(rows), f"Samples, and below at temperature {COOL}"),
            "between": Picture(tile([between]), "From the noise of the first image to that of the last"),
        }


def walk(first: Tensor, last: Tensor, count: int) -> Tensor:
    """From one vector [D] to another along the arc that keeps the length of noise: [count,D]."""
    part = torch.linspace(0, 1, count, device=first.device, dtype=first.dtype)[:, None]
    cosine = functional.cosine_similarity(first, last, dim=0).clamp(-1, 1)
    angle = torch.arccos(cosine).clamp_min(1e-4)
    return (torch.sin((1 - part) * angle) * first + torch.sin(part * angle) * last) / torch.sin(angle)


class Hidden(nn.Module):
    """Images to hidden layers, pooled over places, float32[B,F]. Shares the flow."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow, self.dim = flow, flow.network.dim

    def forward(self, image: Tensor) -> Tensor:
        """uint8[B,C,H,W] to [B,F]: of the middle of each value's bin, so that nothing is random."""
        return self.flow.network((image.float() + 0.5) / 128 - 1).features.float()


class Generator(nn.Module):
    """Makes images of noise, and says how likely images are; see :class:`pipeline.core.evaluation.Likely`."""

    classes = 0
    told = None

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow, self.image_shape = flow, flow.image_shape

    def settings(self, values: Mapping[str, Any]) -> Drawing:
        """How images are made, from plain values."""
        return validate(Drawing, values, "sampler")

    @torch.no_grad()
    def make(self, ids: Tensor, prompt: Batch, seed: int, settings: Drawing) -> Tensor:
        """Images uint8[B,C,H,W] of noise that belongs to the ids.

        Raises:
            NonFiniteError: a sample is not finite.
        """
        x = self.draw(ids, seed, settings)
        if not x.isfinite().all():
            bad = ids[~x.flatten(1).isfinite().all(dim=1)].tolist()
            raise NonFiniteError(f"sample {bad[0]} (one of {len(bad)}) is not finite; the flow has diverged")
        return self.image(x)

    @torch.no_grad()
    def draw(self, ids: Tensor, seed: int, settings: Drawing) -> Tensor:
        """The same as numbers from -1 to 1, float32[B,C,H,W], whether finite or not."""
        noise = SampleRandom(seed, "flow.sample", torch.zeros_like(ids), ids).normal(self.flow.dims)
        # The inverse is exact only if the networks see what they saw in training, so never in half precision.
        with torch.autocast(ids.device.type, enabled=False):
            x = self.flow.network.inverse(settings.temperature * noise)
            return self._denoised(x) if settings.denoise and self.flow.config.noise else x

    def image(self, x: Tensor) -> Tensor:
        """The values nearest to [B,C,H,W]: uint8."""
        if self.flow.config.noise:
            return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return pixels.quantise(x)

    def _denoised(self, x: Tensor) -> Tensor:
        """The expected clean image of each, by the score of the density of noised ones (Tweedie)."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            score = torch.autograd.grad(self.flow.network(x).log_density.sum(), x)[0]
        return x.detach() + self.flow.config.noise**2 * score

    def check_likelihood(self, steps: int | None) -> None:
        """Nothing to choose.

        Raises:
            ConfigError: steps are asked for.
        """
        if steps is not None:
            raise ConfigError(
                f"likelihood.steps = {steps}: a flow's likelihood is exact and has no steps; leave it out"
            )

    def likelihood(self, image: Tensor, ids: Tensor, prompt: Batch, seed: int, steps: int | None) -> Bits:
        """Exact, of dequantised images; never in half precision."""
        random = SampleRandom(seed, "flow.dequantise", torch.zeros_like(ids), ids)
        with torch.autocast(image.device.type, enabled=False):
            bits = self.flow.bits(self.flow.network(self.flow.dequantised(image, random)))
        return Bits("exact", {"": bits.double()})
