"""A denoiser as an encoder: what its blocks say of an image with a little noise on it.

Xiang et al., "Denoising Diffusion Autoencoders are Unified Self-supervised Learners" (ICCV 2023, arXiv 2303.09769).
Shape letters: B samples, C channels, H height, W width, D channels of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.core.errors import ConfigError
from pipeline.core.random import SampleRandom
from pipeline.nn.conditioning import Conditions
from pipeline.nn.diffusion.levels import add_noise
from pipeline.nn.diffusion.model import Denoiser
from pipeline.nn.diffusion.process import Process
from pipeline.nn.diffusion.space import Space
from pipeline.nn.diffusion.targets import to_input


class DenoiserFeatures(nn.Module):
    """uint8[B,C,H,W] to float[B,D]: noise the images a little, and take the mean over places of what blocks give.

    Every image is given the same noise, so that features are a function of the image alone; the network is told neither
    class nor text.

    Args:
        denoiser: shared.
        process: the noise levels that it was trained on.
        blocks: of ``denoiser.network.taps``, whose features are joined in this order.
        quantile: noise level, 0 the cleanest to 1 the noisiest.
        space: what is diffused.

    Raises:
        ConfigError: no such block.
    """

    def __init__(
        self, denoiser: Denoiser, process: Process, blocks: Sequence[str], quantile: float, space: Space
    ) -> None:
        super().__init__()
        taps: dict[str, int] = denoiser.network.taps  # pyright: ignore[reportAssignmentType]
        for block in blocks:
            if block not in taps:
                raise ConfigError(f"there is no block {block!r} to take features from; there are {', '.join(taps)}")
        self.denoiser, self.process, self.blocks, self.quantile = denoiser, process, tuple(blocks), quantile
        self.space = space
        self.dim = sum(taps[block] for block in blocks)

    def forward(self, image: Tensor) -> Tensor:
        """Features of a batch, at least float32."""
        clean = self.space.clean(image, None)
        zeros = torch.zeros(1, dtype=torch.int64, device=image.device)
        noise = SampleRandom(0, "diffusion.features", zeros, zeros).normal(*clean.shape[1:])
        level = self.process.draw(torch.full((len(clean),), self.quantile, device=image.device))
        x = add_noise(clean, noise, level)
        told = self.denoiser.read(None, len(clean), image.device)
        found: dict[str, Tensor] = {}
        for name, h in self.denoiser.network.walk(  # pyright: ignore[reportCallIssue]
            to_input(self.denoiser.target, x, level).float(), Conditions(level.time, told)
        ):
            if name in self.blocks:
                found[name] = h.mean(dim=(2, 3)).to(torch.promote_types(h.dtype, torch.float32))
            if len(found) == len(set(self.blocks)):
                break
        return torch.cat([found[block] for block in self.blocks], dim=1)
