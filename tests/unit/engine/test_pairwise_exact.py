"""Parameter gradients of pairwise losses behind an engine, in float64, against the dense loss of the whole batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import EngineConfig, Optimizer
from pipeline.core.protocols import Batch, Clock, Embeddings, PairwiseObjective, StepContext, StepOutput
from pipeline.dist.group import process_group
from pipeline.engine.accelerate import AccelerateEngine
from pipeline.engine.accumulate import accumulate
from pipeline.nn.contrastive import info_nce, nt_xent, sigmoid_loss
from tests.ranks import start_ranks

CTX = StepContext(seed=7, clock=Clock(0, 0, 100))
BATCH = 24
"""Divisible by 1, 2, 3 and 4 ranks, and their shares by 1, 2 and (but for 4 ranks) 4 micro-batches."""
CASES = [(kind, scale) for kind in ("softmax", "sigmoid", "nt_xent") for scale in (1.0, 14.3, 100.0)]
Gradients = dict[str, np.ndarray]


class Plan:
    def __init__(self, accumulation: int) -> None:
        self.accumulation, self.frozen = accumulation, {}


class Pair(PairwiseObjective):
    """Two towers, a temperature and a bias; tiles that divide nothing."""

    def __init__(self, kind: str, scale: float) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.kind = kind
        self.left, self.right = nn.Linear(6, 5), nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5))
        self.log_scale, self.bias = nn.Parameter(torch.tensor([scale]).log()), nn.Parameter(torch.tensor([-3.0]))
        self.double()

    def embed(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        return {n: functional.normalize(getattr(self, n)(batch["x"]), dim=1) for n in ("left", "right")}

    def shared(self) -> dict[str, Tensor]:
        return {"scale": self.log_scale.exp(), "bias": self.bias * 1}

    def loss(self, embeddings: Embeddings, ctx: StepContext) -> StepOutput:
        left, right = embeddings.rows["left"], embeddings.rows["right"]
        scale, bias = embeddings.shared["scale"], embeddings.shared["bias"]
        if self.kind == "sigmoid":
            return StepOutput(sigmoid_loss(left, right, scale, bias, tile=5), {})
        return StepOutput({"softmax": info_nce, "nt_xent": nt_xent}[self.kind](left, right, scale, tile=5), {})


def batch() -> Batch:
    ids = torch.arange(BATCH)
    x = torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {"id": ids, "epoch": torch.zeros_like(ids), "x": x}


def of(objective: Pair) -> Gradients:
    """Gradients of what the loss uses; engines give zeros for the rest."""
    return {n: p.grad.numpy() for n, p in objective.named_parameters() if p.grad is not None and p.grad.any()}


def engines(chunks: tuple[int, ...]) -> dict[tuple[str, float, int], Gradients]:
    found = {}
    with process_group(1.0) as place:
        for kind, scale in CASES:
            for count in chunks:
                config = EngineConfig(name="accelerate", precision="fp32", micro_batch=1)
                objective = Pair(kind, scale)
                engine = AccelerateEngine(objective, config, Optimizer(lr=1.0), Plan(count), place)
                mine = {n: v.chunk(place.world_size)[place.rank] for n, v in batch().items()}
                parts = zip(*(v.chunk(count) for v in mine.values()), strict=True)
                list(accumulate(engine, [dict(zip(mine, part, strict=True)) for part in parts], CTX))
                found[kind, scale, count] = of(objective)
    return found


def dense(kind: str, scale: float) -> Gradients:
    objective = Pair(kind, scale)
    rows, shared = objective.embed(batch(), CTX), objective.shared()
    left, right, here = rows["left"], rows["right"], torch.arange(BATCH)
    logits = shared["scale"] * left @ right.T
    if kind == "softmax":
        loss = (functional.cross_entropy(logits, here) + functional.cross_entropy(logits.T, here)) / 2
    elif kind == "sigmoid":
        z = 2 * torch.eye(BATCH, dtype=torch.float64) - 1
        loss = -functional.logsigmoid(z * (logits + shared["bias"])).sum() / BATCH
    else:
        views = torch.cat([left, right])
        logits = (shared["scale"] * views @ views.T).masked_fill(torch.eye(2 * BATCH, dtype=torch.bool), -torch.inf)
        loss = functional.cross_entropy(logits, torch.cat([here + BATCH, here]))
    loss.backward()
    return of(objective)


@pytest.mark.parametrize(("world", "chunks"), [(1, (1, 2, 4, 8)), (2, (1, 2, 4)), (3, (1, 2, 4, 8)), (4, (1, 2, 3))])
def test_parameters_and_temperature_have_the_dense_gradient(world, chunks):
    ended = start_ranks(world, engines, chunks=chunks)
    assert [e.problem for e in ended] == [None] * world
    for kind, scale in CASES:
        expected = dense(kind, scale)
        for end in ended:
            for count in chunks:
                found = end.value[kind, scale, count]
                assert found.keys() == expected.keys() and "log_scale" in found
                for name, want in expected.items():
                    error = np.linalg.norm(found[name] - want) / np.linalg.norm(want)
                    assert error < 1e-10, f"{kind} at {scale}, {world} ranks, {count} parts, {name}: {error:.1e}"
