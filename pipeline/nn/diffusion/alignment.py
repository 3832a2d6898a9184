"""A block of a diffusion transformer is drawn to the patches of a frozen encoder.

Yu et al., "Representation Alignment for Generation: Training Diffusion Transformers Is Easier Than You Think" (REPA,
ICLR 2025), https://arxiv.org/abs/2410.06940, eq. 8, with the cosine; the encoder sees the image without noise.
Shape letters: B samples, C channels, H height, W width, N patches, D width of the block, E of the encoder.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Origin
from pipeline.nn.dit import DiT
from pipeline.nn.teacher import Teacher, TeacherConfig


class AlignConfig(TeacherConfig):
    """The encoder, and what is drawn to it."""

    block: str = "block_7"
    """Of the transformer, whose output is projected; the paper's is the eighth."""
    teacher_block: str = "norm"
    """Module of the encoder that gives the patches; "norm": all of a vision transformer."""
    weight: Annotated[float, Field(gt=0)] = 0.5
    hidden: Annotated[int, Field(ge=1)] = 2048
    """Width of the projection's two hidden layers."""

    @field_validator("stored")
    @classmethod
    def _computed(cls, stored: str | None) -> str | None:
        if stored is not None:
            raise ValueError("patches are not stored, only pooled features; leave it out")
        return stored


class Alignment(nn.Module):
    """The encoder and the projection.

    Args:
        config: settings.
        network: what is aligned.
        image_size: height and width of images.

    Raises:
        ConfigError: no such block, or another grid than the encoder's.
    """

    def __init__(self, config: AlignConfig, network: nn.Module, image_size: tuple[int, int]) -> None:
        super().__init__()
        if not isinstance(network, DiT):
            raise ConfigError('objective.align is of a transformer\'s patches; set network.name = "dit"')
        if config.block not in network.taps:
            there = ", ".join(network.taps)
            raise ConfigError(f"objective.align.block: there is no {config.block!r}; there are {there}")
        self.config, self.number = config, list(network.taps).index(config.block)
        with torch.random.fork_rng(devices=[]):
            self.teacher = Teacher(config, image_size, 0)
        grid = getattr(getattr(self.teacher.encoder.backbone, "patch_embed", None), "grid_size", None)
        if grid is not None and tuple(grid) != network.grid:
            raise ConfigError(
                f"objective.align: the encoder has {grid[0]}x{grid[1]} patches of images of "
                f"{self.teacher.image_size[0]}x{self.teacher.image_size[1]}, the network {network.grid[0]}x"
                f"{network.grid[1]}; set align.image_size so that they are as many"
            )
        sizes = (network.taps[config.block], config.hidden, config.hidden, self.teacher.dim)
        first, second, last = (nn.Linear(a, b) for a, b in pairwise(sizes))
        self.project = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)
        for layer in (first, second, last):  # as the transformer's own (the authors' code)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def origin(self) -> Origin:
        """Where the encoder comes from; taken out after training, it is still one that came from a file."""
        return Origin(self.config.weights, self.config.sha256, lambda path: self.teacher.fill(path, ()))

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        """Mean negative cosine between patches: uint8[B,C,H,W] and the block's [B,N,D] to float32[B]."""
        name = self.config.teacher_block
        seen = self.teacher(image.float() / 255, {name}).blocks[name].flatten(2).transpose(1, 2)
        projected = self.project(tokens)
        if seen.shape != projected.shape:
            raise ConfigError(
                f"objective.align: {name!r} of the encoder gives {seen.shape[1]} patches of width {seen.shape[2]}, and "
                f"{projected.shape[1]} of width {projected.shape[2]} are wanted; name another teacher_block"
            )
        return -functional.cosine_similarity(projected.float(), seen.float(), dim=2).mean(dim=1)


class Caught:
    """Catches what a block gives while the network runs.

    Args:
        network: the transformer.
        number: of the block.
    """

    def __init__(self, network: nn.Module, number: int) -> None:
        assert isinstance(network, DiT), "the alignment has seen to it"
        self._block, self._found = network.blocks[number], list[Tensor]()

    def __enter__(self) -> list[Tensor]:
        def catch(_block: nn.Module, _inputs: Any, output: Tensor) -> None:
            self._found.append(output)

        self._handle = self._block.register_forward_hook(catch)
        return self._found

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
