"""Images one part after the other: each pixel, or each code of a map, as the ones before it let expect.

Salimans et al., "PixelCNN++" (ICLR 2017), https://arxiv.org/abs/1701.05517, on pixels: an exact likelihood. A
transformer over the codes of a frozen `vq_vae`: the prior of van den Oord et al. 2017 (1711.00937), section 3.3, with
the network of Esser et al. 2021 (2012.09841), section 3.2; exact for the codes, of which there is no likelihood of
pixels. The networks are in :mod:`pipeline.nn.generative.pixelcnn` and ``causal_transformer``.
Shape letters: B samples, C channels, H height, W width, D = CHW, h and w height and width of the map of codes, N = hw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.mistakes import validate
from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError
from pipeline.core.evaluation import Bits, bits_name
from pipeline.core.protocols import Batch, DataFacts, Objective, Origin, Picture, StepContext, StepOutput
from pipeline.core.random import SampleRandom
from pipeline.nn.dropout import dropping_for
from pipeline.nn.generative import pixels
from pipeline.nn.generative.causal_transformer import CausalTransformer, TransformerConfig
from pipeline.nn.generative.frozen import FrozenAutoencoder, FrozenConfig
from pipeline.nn.generative.pixelcnn import PixelCNN, PixelCNNConfig
from pipeline.nn.images import tile
from pipeline.nn.labels import check_labels

SHOWN = 8
"""Samples in a row of the showcase."""
PURPOSE = "autoregressive.sample"


class Config(Strict):
    """Settings; the defaults are PixelCNN++'s for CIFAR-10."""

    network: PixelCNNConfig | TransformerConfig = PixelCNNConfig()
    """"pixelcnn", of pixels, or "transformer", of the codes of an autoencoder."""
    autoencoder: FrozenConfig | None = None
    """Whose codes are learned; for "transformer"."""
    channels: Annotated[int, Field(ge=1)] = 3
    condition: Literal["none", "class"] = "none"

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if isinstance(self.network, PixelCNNConfig):
            if self.autoencoder is not None:
                raise ValueError('network.name = "pixelcnn" is of pixels: leave autoencoder out, or take "transformer"')
        elif self.autoencoder is None or self.autoencoder.kind != "vq_vae":
            raise ValueError('network.name = "transformer" is of codes: give autoencoder, with kind = "vq_vae"')
        return self


class Seen(NamedTuple):
    """Of a batch."""

    log_likelihood: Tensor
    """In nats, of the image or its codes, float[B]."""
    features: Tensor
    """float[B,F]."""


class Autoregressive(Objective):
    """The network, and the autoencoder whose codes it is of, if it is not of pixels."""

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        self.config, self.image_shape = config, (config.channels, *facts.image_size)
        classes = _classes(config, facts)
        self.needs = {"image": f"uint8[B,{config.channels},H,W]"} | ({"label": "int64[B]"} if classes else {})
        self.autoencoder: FrozenAutoencoder | None = None
        self.model: PixelCNN | CausalTransformer
        if isinstance(config.network, PixelCNNConfig):
            self.model = PixelCNN(config.network, self.image_shape, classes)
        else:
            assert config.autoencoder is not None, "the configuration has seen to it"
            self.autoencoder = FrozenAutoencoder(config.autoencoder, self.image_shape)
            assert self.autoencoder.quantiser is not None, "and to this"
            codes, places = self.autoencoder.quantiser.codes, math.prod(self.autoencoder.shape[1:])
            self.model = CausalTransformer(config.network, codes, places, classes)
        self._names, self._labels_checked = facts.classes, False

    @property
    def dims(self) -> int:
        """D, or N."""
        return math.prod(self.image_shape) if isinstance(self.model, PixelCNN) else self.model.length

    def frozen(self) -> Mapping[str, Origin]:
        """The autoencoder."""
        return {} if self.autoencoder is None else {"autoencoder": self.autoencoder.origin}

    def see(self, image: Tensor, label: Tensor | None) -> Seen:
        """Likelihood and features of uint8[B,C,H,W]."""
        if isinstance(self.model, PixelCNN):
            said, features = self.model(image, label)
            return Seen(self.model.log_likelihood(image, said), features)
        assert self.autoencoder is not None
        code = self.autoencoder.codes(image).flatten(1)
        logits, features = self.model(code, label)
        nats = functional.cross_entropy(logits.transpose(1, 2), code, reduction="none").sum(dim=1)
        return Seen(-nats, features)

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """Bits per dimension of the images; of codes, nats for each."""
        label = batch["label"] if self.model.classes else None
        if label is not None and not self._labels_checked:  # once: it waits for the device
            check_labels(label, self._names)
            self._labels_checked = True
        with dropping_for(batch, ctx) if ctx.training else nullcontext():
            own = self.see(batch["image"], label)
        if isinstance(self.model, PixelCNN):
            name, losses = bits_name("exact"), pixels.bits(own.log_likelihood, self.dims)
        else:
            name, losses = "nats_per_code", -own.log_likelihood / self.dims
        losses = losses.float()
        return StepOutput(losses.mean(), {name: losses.detach().mean()}, losses.detach(), own.features.detach())

    def generator(self) -> nn.Module:
        """What makes images, and of pixels also says how likely they are."""
        return PixelGenerator(self) if self.autoencoder is None else CodeGenerator(self)

    def encoders(self) -> dict[str, nn.Module]:
        """ "image" is the mean over places of what the middle of the network gives."""
        return {"image": Features(self), "generator": self.generator()}

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """Samples by the same numbers every time; of codes also what the autoencoder makes of images."""
        was_training = self.training
        self.eval()
        image = batch["image"][:SHOWN]
        ids = torch.arange(2 * SHOWN, device=image.device)
        prompt = {"label": ids % self.model.classes} if self.model.classes else {}
        generator: Any = self.generator()
        rows = list(generator.make(ids, prompt, ctx.seed, generator.settings({})).split(SHOWN))
        pictures = {"samples": Picture(tile(rows), "Samples, part by part")}
        if self.autoencoder is not None:
            decoded = self.autoencoder.image_of_codes(self.autoencoder.codes(image))
            pictures["decoded"] = Picture(tile([image, decoded]), "Images, and what is decoded of their codes")
        self.train(was_training)
        return pictures


def _classes(config: Config, facts: DataFacts) -> int:
    """That it is told of; 0: none."""
    if config.condition == "class" and not facts.classes:
        raise ConfigError(
            'objective.condition = "class": the data set has no classes; build it from a source with labels, '
            'or set condition = "none"'
        )
    return len(facts.classes) if config.condition == "class" else 0


class Features(nn.Module):
    """Images to features of the middle of the network, which is told no class. Shares the model."""

    def __init__(self, model: Autoregressive) -> None:
        super().__init__()
        self.model, self.dim = model, model.model.dim

    def forward(self, image: Tensor) -> Tensor:
        """uint8[B,C,H,W] to [B,F], at least float32."""
        features = self.model.see(image, None).features
        return features.to(torch.promote_types(features.dtype, torch.float32))


class Made(nn.Module):
    """What generators of both kinds share. Shares the model; see :class:`pipeline.core.evaluation.Maker`."""

    def __init__(self, model: Autoregressive) -> None:
        super().__init__()
        self.model, self.classes = model, model.model.classes
        self.told: Literal["label"] | None = "label" if self.classes else None

    def label(self, prompt: Batch) -> Tensor | None:
        """The classes that are asked for, int64[B].

        Raises:
            ConfigError: the model knows none, or no such class.
        """
        label = prompt.get("label")
        if self.classes and label is None:
            raise ConfigError('this model was trained with condition = "class", and no class is asked for; name one')
        if label is None:
            return None
        if not self.classes:
            raise ConfigError('classes are asked of a model trained without; train with condition = "class"')
        low, high = int(label.min()), int(label.max())
        if low < 0 or high >= self.classes:
            raise ConfigError(f"class {low if low < 0 else high} is asked for; the model knows 0 to {self.classes - 1}")
        return label


class Plainly(Strict):
    """How pixels are drawn: there is one way, as likely as the model says."""


class PixelGenerator(Made):
    """Draws pixels, and says how likely images are: exactly."""

    def __init__(self, model: Autoregressive) -> None:
        super().__init__(model)
        self.image_shape = model.image_shape

    def settings(self, values: Mapping[str, Any]) -> Plainly:
        """There are none."""
        return validate(Plainly, values, "sampler")

    def make(self, ids: Tensor, prompt: Batch, seed: int, settings: Plainly) -> Tensor:
        """uint8[B,C,H,W]."""
        assert isinstance(self.model.model, PixelCNN)
        channels, height, width = self.image_shape
        uniform = SampleRandom(seed, PURPOSE, torch.zeros_like(ids), ids).uniform(height * width, 1 + channels)
        return self.model.model.sample(uniform, self.label(prompt))

    def check_likelihood(self, steps: int | None) -> None:
        """It has no steps.

        Raises:
            ConfigError: some are asked for.
        """
        if steps is not None:
            raise ConfigError(f"likelihood.steps = {steps}: this likelihood is exact and has no steps; leave it out")

    def likelihood(self, image: Tensor, ids: Tensor, prompt: Batch, seed: int, steps: int | None) -> Bits:
        """Exact."""
        found = self.model.see(image, self.label(prompt)).log_likelihood
        return Bits("exact", {"": pixels.bits(found.double(), self.model.dims)})


class Drawing(Strict):
    """How codes are drawn."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Logits are divided by it; 1: as likely as the model says."""


class CodeGenerator(Made):
    """Draws codes, and decodes them. Of the likelihood of an image it knows nothing: only of that of its codes."""

    def settings(self, values: Mapping[str, Any]) -> Drawing:
        """How images are made, from plain values."""
        return validate(Drawing, values, "sampler")

    def make(self, ids: Tensor, prompt: Batch, seed: int, settings: Drawing) -> Tensor:
        """uint8[B,C,H,W]."""
        model, autoencoder = self.model.model, self.model.autoencoder
        assert isinstance(model, CausalTransformer) and autoencoder is not None
        uniform = SampleRandom(seed, PURPOSE, torch.zeros_like(ids), ids).uniform(model.length)
        codes = model.sample(uniform, self.label(prompt), settings.temperature)
        return autoencoder.image_of_codes(codes.unflatten(1, autoencoder.shape[1:]))
