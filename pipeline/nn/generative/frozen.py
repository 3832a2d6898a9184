"""An autoencoder that was trained before and stays as it is: images to latents or codes, and back.

Its file is what ``sluice export`` wrote of `vae` or `vq_vae`, or the weights of diffusers' ``AutoencoderKL`` or
``VQModel``. Shape letters: B samples, C channels, H height, W width, Z channels of the code, h and w its height and
width, K codes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from pipeline.config.strict import Text
from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Origin
from pipeline.core.random import SampleRandom
from pipeline.nn.generative.autoencoder import Autoencoder, from_diffusers
from pipeline.nn.generative.codebook import Codebook, CodesConfig, Scalars
from pipeline.nn.generative.gaussian import Posterior
from pipeline.nn.generative.observed import Kind, Observed
from pipeline.nn.weights import FACTS, read

OLD_NAMES = {"query.": "to_q.", "key.": "to_k.", "value.": "to_v.", "proj_attn.": "to_out.0."}
"""Of the attention in diffusers' files of before 2023, such as those of Stable Diffusion's autoencoders."""
OWN = ("model.", "quantiser.", "pixels.")
"""Beginnings of what is read of an objective's weights."""
CODES = "quantize.embedding.weight"
"""The codes by diffusers' name."""


class FrozenConfig(CodesConfig):
    """An autoencoder and its file."""

    kind: Literal["vae", "vq_vae"]
    """The objective that it was trained by."""
    weights: Text
    """objective.safetensors of its `sluice export`, or diffusers' diffusion_pytorch_model.safetensors."""
    sha256: str | None = None
    """That the file must have; left out: whatever it has when the run begins, and the same ever after."""
    decoder: Kind = "logistic"
    """As it was trained; "logistic" for diffusers' weights."""

    @model_validator(mode="after")
    def _fits(self) -> FrozenConfig:
        if self.kind == "vae" and (self.quantiser, self.codes, self.cosine) != ("average", 512, False):
            raise ValueError(
                'quantiser, codes and cosine are for kind = "vq_vae"; a "vae" has no codes: leave them out'
            )
        return self


class FrozenAutoencoder(nn.Module):
    """The autoencoder; random until :meth:`fill`.

    Args:
        config: what it is.
        image_shape: C, H, W.

    Raises:
        ConfigError: images of a size that it cannot halve.
    """

    def __init__(self, config: FrozenConfig, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.config = config
        network, grid = config.network, config.network.grid((image_shape[1], image_shape[2]))
        self.shape = (network.latent, *grid)
        """Z, h, w."""
        with torch.random.fork_rng(devices=[]):  # what is trained beside it begins the same, whatever it is
            self.model = Autoencoder(network, image_shape[0], network.latent * (2 if config.kind == "vae" else 1))
            self.quantiser = _quantiser(config) if config.kind == "vq_vae" else None
        self.pixels = Observed(config.decoder, image_shape)
        self.eval().requires_grad_(False)

    @property
    def origin(self) -> Origin:
        """Where it comes from. It is kept, since samples and features need it."""
        return Origin(self.config.weights, self.config.sha256, self.fill, kept=True)

    @torch.no_grad()
    def latents(self, image: Tensor, random: SampleRandom | None) -> Tensor:
        """What stands for images, at least float32[B,Z,h,w].

        Of a "vq_vae" what the encoder gives before it is quantised, as latent diffusion has it.

        Args:
            image: uint8[B,C,H,W].
            random: to draw from a "vae"'s posterior; None: its mean.
        """
        coded = self.model.encode(image.float() / 127.5 - 1)
        if self.quantiser is not None:
            return coded
        own = Posterior.of(coded)
        return own.mean if random is None else own.draw(random.normal(*self.shape))

    @torch.no_grad()
    def image(self, latents: Tensor, ids: Tensor | None = None) -> Tensor:
        """[B,Z,h,w] to uint8[B,C,H,W]; see :meth:`Observed.image`."""
        z = latents if self.quantiser is None else self.quantiser(latents).z
        return self.pixels.image(self.model.decode(z), ids)

    @torch.no_grad()
    def codes(self, image: Tensor) -> Tensor:
        """Numbers of the codes, of uint8[B,C,H,W]: int64[B,h,w]. In fp32: rounded, others would be the nearest."""
        assert self.quantiser is not None, "a vae has no codes"
        with torch.autocast(image.device.type, enabled=False):
            return self.quantiser(self.model.encode(image.float() / 127.5 - 1)).index

    @torch.no_grad()
    def image_of_codes(self, index: Tensor) -> Tensor:
        """int64[B,h,w] to uint8[B,C,H,W]."""
        assert self.quantiser is not None, "a vae has no codes"
        return self.pixels.image(self.model.decode(self.quantiser.lookup(index)))

    def fill(self, path: str) -> None:
        """Fill it from its file.

        Raises:
            ConfigError: of another model, or trained with other settings.
            CheckpointError: damaged.
        """
        stored, metadata = read(path)
        if FACTS in metadata:
            self._hold(path, json.loads(metadata["config"])["objective"])
        elif not any(name.startswith("model.") for name in stored):
            stored = _of_diffusers(stored)
        stored = {name: value for name, value in stored.items() if name.startswith(OWN)}  # a critic stays behind
        wanted = self.state_dict()
        spare = {"quantiser.sums", "quantiser.counts", "pixels.log_scale"}
        for name in sorted((stored.keys() | wanted.keys()) - spare):
            shapes = [tuple(side[name].shape) if name in side else "absent" for side in (stored, wanted)]
            if shapes[0] != shapes[1]:
                raise ConfigError(
                    f"{path} is of another autoencoder: {name} is {shapes[0]} there and {shapes[1]} here; set kind, "
                    "network and codes as it was trained"
                )
        self.load_state_dict({name: stored.get(name, value) for name, value in wanted.items()})

    def _hold(self, path: str, theirs: Mapping[str, Any]) -> None:
        """Compare with what an export says of itself."""
        if theirs["name"] != self.config.kind:
            raise ConfigError(f"{path} was trained as {theirs['name']!r}, and kind = {self.config.kind!r} is asked for")
        own = ("network", "decoder") if self.config.kind == "vae" else (*CodesConfig.model_fields, "decoder")
        known = {name: theirs[name] for name in own if name in theirs}
        was = FrozenConfig(kind=self.config.kind, weights=path, **known)
        for name in own:
            if getattr(was, name) != getattr(self.config, name):
                raise ConfigError(
                    f"{path} was trained with {name} = {getattr(was, name)}, and is to be used with "
                    f"{getattr(self.config, name)}; set it to that"
                )


def _quantiser(config: CodesConfig) -> Codebook | Scalars:
    if config.quantiser == "scalar":
        return Scalars(config.levels)
    return Codebook(config.codes, config.network.latent, commitment=0, decay=None, cosine=config.cosine, revive=0)


def _of_diffusers(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By our names, and laid out as here."""
    found: dict[str, Tensor] = {}
    for name, value in from_diffusers(stored).items():
        for old, new in OLD_NAMES.items():
            name = name.replace(old, new) if ".attentions." in name else name
        found["quantiser.weight" if name == CODES else f"model.{name}"] = value
    return found
