"""How well a model restores what was taken away from images that it has not been trained on: PSNR and SSIM.

As super-resolution is measured (Ledig et al. 2017, https://arxiv.org/abs/1609.04802, table 2), but of all channels and
whole images, not of luminance without a border: numbers of papers are higher. Chance, as where an image is hidden,
belongs to the sample.
Shape letters: B samples, C channels, H height, W width.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Protocol, cast

import torch
from pydantic import Field
from torch import Tensor

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError
from pipeline.core.evaluation import EvalContext, Evaluation, Number, Uses
from pipeline.evals._samples import chosen, in_order
from pipeline.nn.image_quality import WINDOW, psnr, ssim


class Restoring(Protocol):
    """The encoder "restorer"."""

    def __call__(self, image: Tensor, ids: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """What is given of images, as an image, and what is made of it: uint8[B,C,H,W] each."""
        ...


class Config(Strict):
    """Settings of the evaluation."""

    test: str = "val"
    """Stream that is measured."""
    samples: Annotated[int, Field(ge=1)] | None = None
    """Images to measure, drawn from the whole stream; left out: all."""
    seed: Annotated[int, Field(ge=0)] = 0


class Restoration(Evaluation):
    """Reports "restoration/psnr", in dB, and "restoration/ssim", and beside each "..._given", of what is given.

    Given is what stands for it without a model: plain upscaling, or grey where an image is hidden.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """Images, and what restores them."""
        return Uses({self.config.test: ("image",)}, ("restorer",))

    def run(self, ctx: EvalContext) -> Iterator[Number]:
        """Measure; every rank its share.

        Raises:
            ConfigError: images that are too small for SSIM.
        """
        own, test = self.config, ctx.streams[self.config.test]
        restore, device = cast("Restoring", ctx.encoders["restorer"]), ctx.place.device
        wanted = test.samples if own.samples is None else min(test.samples, own.samples)
        rows: list[tuple[Tensor, Tensor]] = []
        for batch in test:
            mine = chosen(batch["id"], test.samples, wanted)
            image, ids = batch["image"][mine].to(device), batch["id"][mine].to(device)
            if min(image.shape[2:]) < WINDOW:
                raise ConfigError(f"SSIM looks at {WINDOW} pixels, images are {image.shape[2]}x{image.shape[3]}")
            if len(ids):
                measured = [m(image, x).double() for x in restore(image, ids, own.seed)[::-1] for m in (psnr, ssim)]
                rows.append((ids.cpu(), torch.stack(measured, dim=1).cpu()))
        _, values = in_order(rows)
        for name, column in zip(("psnr", "ssim", "psnr_given", "ssim_given"), values.T, strict=True):
            error = float(column.std(correction=0)) / math.sqrt(len(column))
            better = None if name.endswith("given") else "higher"
            kept = column.float().numpy()
            yield Number(f"restoration/{name}", float(column.mean()), len(column), own.test, error, better, kept)
