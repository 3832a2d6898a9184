"""A linear classifier of patches: how much of where things are can be read off without changing the encoder.

DINOv2 and DINOv3's linear protocol (Oquab et al. 2023, section 7.4; its code's ADE20K config: batch norm and a 1 x 1
convolution on the last block's patches, bilinear to the size of the mask, cross-entropy, AdamW at 1e-3 with weight
decay 1e-3, batches of 16), on whole images in the suite's geometry instead of crops and sliding windows, and for fewer
steps.
The batch norm has the statistics of all training patches, so that no batch decides. Each rank keeps the patches of its
own share of the training images in main memory, 4 D h w bytes an image; gradients are those of the batch in any number
of ranks, added up in float64.

Shape letters: B images, D width, h, w patches, H, W pixels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.evaluation import EvalContext, Evaluation, Figure, Number, Output, Table, Uses
from pipeline.dist.group import by_all, gather_objects, sum_over_ranks
from pipeline.evals._figures import colour
from pipeline.nn.reading import patches

EPSILON = 1e-5
SHOWN = 6
"""Images of the figure."""
SCALE = 2
"""Screen pixels of an image's pixel, in the figure."""


class Config(Strict):
    """Settings of the segmentation."""

    train: str = "train"
    """Stream that the classifier is fitted on."""
    test: str = "val"
    """Stream that it is measured on."""
    ignore: Annotated[int, Field(ge=0)] | None = 255
    """Value of pixels that do not count."""
    classes: Annotated[int, Field(ge=2)] | None = None
    """Values of the masks, 0 and up; left out: one for each class that the training data names."""
    steps: Annotated[int, Field(ge=1)] = 1000
    batch: Annotated[int, Field(ge=1)] = 16
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """At the start; it falls to 0 along half a cosine."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-3
    seed: int = 0
    """Of the order of images."""


class Segmentation(Evaluation):
    """Reports "segmentation/miou", the mean over classes of intersection over union, counted over all pixels of the
    stream; "segmentation/pixel_accuracy" and "segmentation/mean_class_accuracy".

    Classes that are neither in a mask nor guessed count in no mean. The table "segmentation/classes" has each class and
    the figure "segmentation/examples" images, masks and guesses.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """Images with masks."""
        return Uses({name: ("image", "mask") for name in (self.config.train, self.config.test)})

    def check(self, ctx: EvalContext) -> None:
        """There are classes."""
        if self.config.classes is None and len(ctx.streams[self.config.train].classes) < 2:
            raise ConfigError(
                f"segmentation.classes: stream {self.config.train!r} names no classes, so that their number is not "
                "known; set it to the largest value of the masks and 1"
            )

    def run(self, ctx: EvalContext) -> Iterator[Output]:
        """Read patches on all ranks, fit together, measure each its share.

        Raises:
            ConfigError: the encoder has no patches.
            DataError: a mask has a value that is no class.
        """
        train, split = ctx.streams[self.config.train], self.config.test
        names = [*train.classes] if self.config.classes is None else [*map(str, range(self.config.classes))]
        head = self._fit(ctx, len(names))
        table, examples = self._measured(ctx, head, len(names))
        right, truth, guess = (x.double() for x in (table.diagonal(), table.sum(dim=1), table.sum(dim=0)))
        union = truth + guess - right
        seen = union > 0
        iou, accuracy = right / union, right / truth
        n = ctx.streams[split].samples
        yield Number("segmentation/miou", float(iou[seen].mean()), n, split)
        yield Number("segmentation/pixel_accuracy", float(right.sum() / truth.sum()), n, split)
        yield Number("segmentation/mean_class_accuracy", float(accuracy[truth > 0].mean()), n, split)
        rows = [
            (name, int(truth[i]), float(iou[i]), float(accuracy[i]) if truth[i] else None)
            for i, name in enumerate(names)
            if seen[i]
        ]
        yield Table("segmentation/classes", ("class", "pixels", "iou", "accuracy"), rows, split)
        caption = "Each row: an image, its mask, and what the linear classifier makes of it"
        yield Figure("segmentation/examples", _shown(examples, len(names), self.config.ignore), caption, split)

    def _read(self, ctx: EvalContext, stream: str, classes: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Of this rank's batches: ids, images, patches float32[B,D,h,w], masks int64[B,H,W], -1 where it is ignored."""
        encoder = ctx.encoders["image"]
        for batch in ctx.streams[stream]:
            mask = batch["mask"].long()
            if self.config.ignore is not None:
                mask = mask.masked_fill(mask == self.config.ignore, -1)
            if int(mask.max()) >= classes:
                raise DataError(
                    f"a mask of stream {stream!r} has the value {int(mask.max())}, but there are {classes} classes, 0 "
                    f"to {classes - 1}: set segmentation.classes, or segmentation.ignore if it stands for nothing"
                )
            image = batch["image"].to(ctx.place.device)
            yield batch["id"].cpu(), batch["image"].cpu(), patches(encoder, image).float().cpu(), mask.cpu()

    def _fit(self, ctx: EvalContext, classes: int) -> Linear:
        """The classifier, the same on every rank."""
        own = by_all(lambda: self._kept(ctx, classes))
        width = next(d for d in gather_objects(next((len(x) for x, _ in own.values()), None)) if d is not None)
        head = Linear(width, classes, *_statistics([x for x, _ in own.values()], width)).to(ctx.place.device)
        optimizer = torch.optim.AdamW(head.parameters(), lr=self.config.lr, weight_decay=self.config.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / self.config.steps))
        )
        for step, chosen in enumerate(self._batches(ctx.streams[self.config.train].samples)):
            gradients = [torch.zeros(p.shape, dtype=torch.float64) for p in head.parameters()]
            pixels = torch.zeros((), dtype=torch.float64)
            for sample in (s for s in chosen if s in own):
                x, mask = (t.to(ctx.place.device) for t in own[sample])
                with torch.enable_grad():
                    loss = functional.cross_entropy(
                        head(x[None], mask.shape), mask[None], ignore_index=-1, reduction="sum"
                    )
                    found = torch.autograd.grad(loss, list(head.parameters()))
                gradients = [total + g.double().cpu() for total, g in zip(gradients, found, strict=True)]
                pixels += int((mask >= 0).sum())
            pixels = sum_over_ranks(pixels).clamp_min(1)
            for parameter, total in zip(head.parameters(), gradients, strict=True):
                parameter.grad = (sum_over_ranks(total) / pixels).to(parameter)
            optimizer.step()
            schedule.step()
            ctx.show("segmentation", step + 1, self.config.steps)
        return head

    def _kept(self, ctx: EvalContext, classes: int) -> dict[int, tuple[Tensor, Tensor]]:
        """Patches and mask of each training image of this rank, by its id."""
        read = self._read(ctx, self.config.train, classes)
        rows = (row for ids, _, x, mask in read for row in zip(ids.tolist(), x, mask, strict=True))
        return {sample: (x, mask) for sample, x, mask in rows}

    def _batches(self, samples: int) -> Iterator[list[int]]:
        """Ids of each step: passes over all in random orders, one after the other."""
        generator = torch.Generator().manual_seed(self.config.seed)
        left: list[int] = []
        for _ in range(self.config.steps):
            while len(left) < self.config.batch:
                left += torch.randperm(samples, generator=generator).tolist()
            yield left[: self.config.batch]
            left = left[self.config.batch :]

    def _measured(self, ctx: EvalContext, head: Linear, classes: int) -> tuple[Tensor, list[Example]]:
        """Pixels of a class (rows) that are taken for one (columns), int64[K,K]; and the first images."""
        table, examples = by_all(lambda: self._of_rank(ctx, head, classes))
        found = [example for own in gather_objects(examples) for example in own]
        return sum_over_ranks(table), sorted(found, key=lambda example: example.sample)

    def _of_rank(self, ctx: EvalContext, head: Linear, classes: int) -> tuple[Tensor, list[Example]]:
        table, examples = torch.zeros(classes, classes, dtype=torch.int64), list[Example]()
        for ids, image, x, mask in self._read(ctx, self.config.test, classes):
            for i, sample in enumerate(ids.tolist()):
                guess = head(x[i : i + 1].to(ctx.place.device), mask.shape[1:]).argmax(dim=1)[0].cpu()
                counted = mask[i] >= 0
                pairs = mask[i][counted] * classes + guess[counted]
                table += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
                if sample < SHOWN:
                    examples.append(Example(sample, image[i].numpy(), mask[i].numpy(), guess.numpy()))
        return table, examples


class Linear(nn.Module):
    """Standardised patches, a 1 x 1 convolution, enlarged."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int, classes: int, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", (variance + EPSILON).sqrt())
        self.layer = nn.Conv2d(width, classes, 1)
        nn.init.normal_(self.layer.weight, std=0.01, generator=torch.Generator().manual_seed(0))
        nn.init.zeros_(self.layer.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor, size: tuple[int, ...]) -> Tensor:
        """[B,D,h,w] to logits [B,K,*size]."""
        mean, deviation = (t.view(-1, 1, 1) for t in (self.mean, self.deviation))
        return functional.interpolate(self.layer((x - mean) / deviation), size=size, mode="bilinear")


class Example(NamedTuple):
    """An image with its mask and what it was taken for."""

    sample: int
    image: np.ndarray
    """uint8[C,H,W]."""
    mask: np.ndarray
    """int64[H,W], -1 where it is ignored."""
    guess: np.ndarray
    """int64[H,W]."""


def _statistics(images: list[Tensor], width: int) -> tuple[Tensor, Tensor]:
    """Mean and variance float32[D] of all patches of all ranks."""
    total, square, count = (torch.zeros(n, dtype=torch.float64) for n in (width, width, 1))
    for x in images:
        flat = x.flatten(1).double()
        total, square, count = total + flat.sum(dim=1), square + flat.square().sum(dim=1), count + flat.shape[1]
    total, square, count = (sum_over_ranks(t) for t in (total, square, count))
    mean = total / count
    return mean.float(), (square / count - mean.square()).clamp_min(0).float()


def _shown(examples: list[Example], classes: int, ignore: int | None) -> np.ndarray:
    """Rows of image, mask and guess, uint8[height,width,3]; ignored pixels are black."""
    palette = np.array([*(colour(i, classes) for i in range(classes)), (0, 0, 0)])
    palette = np.round(palette * 255).astype(np.uint8)
    rows = []
    for example in examples:
        image = np.broadcast_to(example.image[:3], (3, *example.image.shape[1:])).transpose(1, 2, 0)
        row = np.concatenate([image, palette[example.mask], palette[example.guess]], axis=1)
        rows.append(np.repeat(np.repeat(row, SCALE, axis=0), SCALE, axis=1))
    return np.concatenate(rows)
