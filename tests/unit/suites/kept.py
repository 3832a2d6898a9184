"""Encoders and streams for tests of kept features; what runs in processes of its own stands here, to be importable."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.core.evaluation import OWN, Features, Reading
from pipeline.core.protocols import Batch
from pipeline.dist.group import LAUNCH_VARIABLES, process_group
from pipeline.suites.feature_cache import FeatureCache
from pipeline.suites.feature_store import FeatureStore, Source
from tests.contracts.components import ListStream

CALLS: list[int] = []
"""Sizes of the batches that were encoded in this process."""
GB = 10**9
SAMPLES = 23


class Encoder(nn.Module):
    """Products with random weights; ``scale`` is a setting that is no weight."""

    def __init__(self, dim: int = 6, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, dim, generator=torch.Generator().manual_seed(7)))
        self.scale = scale

    def forward(self, image: Tensor) -> Tensor:
        CALLS.append(len(image))
        return image.flatten(1).float() @ self.weight * self.scale


class Twin(Encoder):
    """The same weights under another name."""


class Slow(Encoder):
    """Leaves a line for each batch in a file, and takes its time."""

    def forward(self, image: Tensor) -> Tensor:
        with open(LOG[0], "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.02)
        if len(CALLS) == DIES[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(image)


LOG: list[Path] = [Path(os.devnull)]
DIES = [-1]
"""Before this batch the process is killed."""
FACTS = {"manifest": "m", "samples": SAMPLES, "image": {"size": 2}, "fields": ["image", "label"], "captions": {}}


def images(samples: int = SAMPLES) -> Tensor:
    return torch.randint(0, 256, (samples, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def source(name: str = "val", stream: type[ListStream] = ListStream, **facts: object) -> Source:
    rank, world = dist.get_rank(), dist.get_world_size()
    return Source(name, stream(images(), torch.arange(SAMPLES) % 3, rank, world), FACTS | facts)


class Never(ListStream):
    """A stream that nobody may walk."""

    def __iter__(self) -> Iterator[Batch]:
        raise AssertionError("it was walked")


def store(folder: Path, gb: float = 1.0) -> FeatureStore:
    return FeatureStore(cache=FeatureCache(folder, int(gb * GB)))


@torch.no_grad()
def get(
    kept: FeatureStore, encoder: nn.Module, of: Source, reading: Reading = OWN, fields: tuple[str, ...] = ("label",)
) -> Features:
    return kept.get("image", encoder, of, [reading], fields)[reading]


def in_a_process(folder: Path, log: Path, dies: int = -1) -> np.ndarray:
    """Features by a slow encoder, in a process with a group of its own."""
    for name in LAUNCH_VARIABLES:
        del os.environ[name]
    with process_group(timeout_minutes=1):
        LOG[0], DIES[0] = log, dies
        return get(store(folder), Slow(), source()).x.numpy().copy()
