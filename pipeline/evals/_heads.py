"""Linear heads on frozen features, many at once: one step of all of them is one product of matrices per reading.

SGD with momentum 0.9 on the mean cross-entropy, a cosine to zero, as DINOv2's linear probe (Oquab et al. 2023). Heads
share batches and initial weights and nothing else, so that each ends where it would alone. Learning rates are for a
batch of 256 and grow with the batch.
Shape letters: N samples, B of a batch, D width, K classes, H heads of a reading.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.core.evaluation import Reading

RATED = 256
"""Samples per batch that learning rates are for."""
MOMENTUM = 0.9
START = 0.01
"""Standard deviation of the initial weights."""
EPSILON = 1e-6
"""Of the batch norm, as in MAE."""
SCORED = 4096
"""Samples scored at once."""


class Head(NamedTuple):
    """One of a grid."""

    rate: float
    """Learning rate at the start, for a batch of 256."""
    reading: Reading
    """What it is given."""


class Course(NamedTuple):
    """How heads are trained."""

    steps: int
    batch: int
    """Samples per step, on one rank."""
    batch_norm: bool
    """Behind a batch norm without scale and shift, as MAE's probe (He et al. 2022)."""
    seed: int
    """Of the batches and the initial weights."""


class Linear(NamedTuple):
    """A head that is ready; a batch norm before it is folded into it."""

    weight: Tensor
    """float32[K,D]."""
    bias: Tensor
    """float32[K]."""

    def scores(self, x: Tensor) -> Tensor:
        """float32[N,K] of features [N,D]; on the CPU."""
        return torch.cat([(part.to(self.weight) @ self.weight.T + self.bias).cpu() for part in x.split(SCORED)])


class Stack:
    """Heads of one reading.

    Args:
        columns: of what it is given, that it reads.
        rates: of its heads.
        classes: K.
        seed: of the initial weights, which are the same for each.
        device: that computes.
    """

    def __init__(self, columns: slice, rates: Sequence[float], classes: int, seed: int, device: torch.device) -> None:
        self.columns, self.classes, self.heads = columns, classes, len(rates)
        self.rates = torch.tensor(rates, device=device).repeat_interleave(classes)
        generator = torch.Generator().manual_seed(seed)
        start = START * torch.randn(columns.stop - columns.start, classes, generator=generator)
        self.weight = start.repeat(1, len(rates)).to(device)
        """[D,H*K], so that a step of all heads is one product."""
        self.bias = torch.zeros(len(rates) * classes, device=device)
        self.velocity = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]

    def step(self, x: Tensor, label: Tensor, decay: float) -> None:
        """One update of all heads on a batch [B,D'], whose ``columns`` they read; rates are multiplied by ``decay``."""
        x = x[:, self.columns]
        wrong = self.scores(x).softmax(dim=2)
        wrong[torch.arange(len(x), device=x.device), :, label] -= 1
        wrong = wrong.flatten(1).div_(len(x))
        torch.addmm(self.velocity[0], x.T, wrong, beta=MOMENTUM, out=self.velocity[0])
        self.velocity[1].mul_(MOMENTUM).add_(wrong.sum(dim=0))
        for parameter, velocity in zip((self.weight, self.bias), self.velocity, strict=True):
            parameter.addcmul_(velocity, self.rates, value=-decay)

    def scores(self, x: Tensor) -> Tensor:
        """[B,H,K] of what the heads read, [B,D]."""
        return torch.addmm(self.bias, x, self.weight).view(len(x), self.heads, self.classes)


class Heads:
    """A grid of heads.

    Args:
        grid: what each is given, and its learning rate.
        columns: of the features, for every reading.
        classes: K.
        course: how they are trained.
        device: that computes.
    """

    def __init__(
        self, grid: Sequence[Head], columns: Mapping[Reading, slice], classes: int, course: Course, device: torch.device
    ) -> None:
        self.grid, self.course, self.device = tuple(grid), course, device
        self.readings = list(dict.fromkeys(head.reading for head in grid))
        read = [columns[reading] for reading in self.readings]
        self.span = slice(min(part.start for part in read), max(part.stop for part in read))
        """Of the features that any head reads."""
        self.stacks = {
            reading: Stack(
                slice(part.start - self.span.start, part.stop - self.span.start),
                [head.rate for head in grid if head.reading == reading],
                classes,
                course.seed,
                device,
            )
            for reading, part in zip(self.readings, read, strict=True)
        }
        width = self.span.stop - self.span.start
        norm = nn.BatchNorm1d(width, affine=False, eps=EPSILON) if course.batch_norm else nn.Identity()
        self.norm = norm.to(device)

    @torch.no_grad()
    def train(
        self, x: Tensor, label: Tensor, places: Tensor, show: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Train all heads.

        Args:
            x: features float32[N,D'] on the CPU; what a head reads are columns of it.
            label: int64[N].
            places: int64, of the samples that are trained on.
            show: steps done, of how many.
        """
        steps, batch = self.course.steps, min(self.course.batch, len(places))
        generator = torch.Generator().manual_seed(self.course.seed)
        order = torch.empty(0, dtype=torch.int64)
        self.norm.train()
        for step in range(steps):
            if len(order) < batch:  # the rest of an epoch is left out
                order = places[torch.randperm(len(places), generator=generator)]
            chosen, order = order[:batch], order[batch:]
            part, truth = self.norm(x[chosen, self.span].to(self.device)), label[chosen].to(self.device)
            decay = batch / RATED * (1 + math.cos(math.pi * step / steps)) / 2
            for stack in self.stacks.values():
                stack.step(part, truth, decay)
            show(step + 1, steps)
        self.norm.eval()

    @torch.no_grad()
    def hits(self, x: Tensor, label: Tensor, places: Tensor) -> list[int]:
        """How many of the samples at ``places`` each head classifies rightly; one that diverged, none."""
        hits = {reading: torch.zeros(stack.heads, dtype=torch.int64) for reading, stack in self.stacks.items()}
        for chosen in places.split(SCORED):
            normed, truth = self.norm(x[chosen, self.span].to(self.device)), label[chosen].to(self.device)
            for reading, stack in self.stacks.items():
                scores = stack.scores(normed[:, stack.columns])
                right = (scores.argmax(dim=2) == truth[:, None]) & scores.isfinite().all(dim=2)
                hits[reading] += right.sum(dim=0).cpu()
        left = {reading: iter(found.tolist()) for reading, found in hits.items()}
        return [next(left[head.reading]) for head in self.grid]

    def head(self, number: int) -> Linear:
        """One of the grid, on the CPU."""
        own = self.grid[number]
        stack = self.stacks[own.reading]
        place = [h for h in self.grid[:number] if h.reading == own.reading]
        columns = slice(len(place) * stack.classes, (len(place) + 1) * stack.classes)
        weight, bias = stack.weight[:, columns].T.cpu(), stack.bias[columns].cpu()
        if self.course.batch_norm:
            buffers = dict(self.norm.named_buffers())
            mean, variance = (buffers[f"running_{what}"][stack.columns].cpu() for what in ("mean", "var"))
            weight = weight / (variance + EPSILON).sqrt()
            bias = bias - weight @ mean
        return Linear(weight.contiguous(), bias.clone())
