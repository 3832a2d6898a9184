"""A generator whose samples are known: each class is a flat image of its own grey, with a little noise."""

import torch
from torch import nn

from pipeline.nn.diffusion.levels import schedule
from pipeline.nn.diffusion.model import Denoiser, Generator, SamplerConfig
from pipeline.nn.diffusion.process import Discrete
from tests.contracts.components import ListStream, context, numbers

CLASSES, SHAPE, STEPS = 5, (3, 4, 4), 40


def grey(label):
    """-0.8 to 0.8; of no class, 0."""
    return torch.where(label == CLASSES, 0.0, label / (CLASSES - 1) * 1.6 - 0.8)


class Known(nn.Module):
    """E[image | x, class] for images grey(class) + std * noise; told nothing else."""

    def __init__(self, std=0.05):
        super().__init__()
        self.std = nn.Parameter(torch.tensor([std]))
        self.levels = schedule("linear", STEPS)

    def forward(self, x, given):
        index = (given.time * STEPS / 1000).round().long()
        a, s = (v[index].float().view(-1, 1, 1, 1) for v in (self.levels.a, self.levels.s))
        label = given.told.label
        m = grey(label).float().view(-1, 1, 1, 1) if label is not None else 0.0
        return m + a * self.std**2 / (a**2 * self.std**2 + s**2) * (x - a * m)


def generator(std=0.05, classes=CLASSES):
    process = Discrete(schedule("linear", STEPS))
    sampler = SamplerConfig(name="ddim", steps=10)
    return Generator(Denoiser(Known(std), "image", False, classes), process, SHAPE, "small", sampler).eval()


class Grey(nn.Module):
    """The judge: mean grey per channel, and the class of the nearest grey."""

    dim = 3

    def __init__(self, logits):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.logits = logits

    def forward(self, image):
        mean = (image.float() / 127.5 - 1).mean(dim=(2, 3)) * self.scale
        if not self.logits:
            return mean
        return -(mean.mean(dim=1, keepdim=True) - grey(torch.arange(CLASSES))).abs()


def real(n=200, std=0.05, seed=0, rank=0, world=1):
    label = torch.arange(n) % CLASSES
    x = grey(label).view(-1, 1, 1, 1) + std * torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return ListStream(((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), label, rank, world, batch=40)


def encoders(**settings):
    return {"generator": generator(**settings), "judge.image": Grey(False), "judge.logits": Grey(True)}


def run(evaluation, encoders, streams):
    return numbers(evaluation, context(encoders, streams, classes=tuple(f"class {i}" for i in range(CLASSES))))
