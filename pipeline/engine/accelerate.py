"""Accelerate: one process to a few GPUs. The only file that knows it."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext

import torch
from torch import Tensor

from pipeline.config.resolve import Plan
from pipeline.config.schema import EngineConfig
from pipeline.config.schema import Optimizer as OptimizerConfig
from pipeline.core.protocols import Batch, Objective, StepContext, StepOutput
from pipeline.dist.group import Place
from pipeline.engine import optimizers
from pipeline.engine.base import BaseEngine
from pipeline.engine.fragments import Slot


class AccelerateEngine(BaseEngine):
    """The objective under Accelerate's data parallelism; bf16 is autocast over fp32 parameters."""

    replicated = True

    def __init__(
        self, objective: Objective, config: EngineConfig, optimizer: OptimizerConfig, plan: Plan, place: Place
    ) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        # Data parallelism otherwise rebuilds its buckets after the first step, which changes the order of sums: a run
        # that was resumed would differ in the last bits from one that was not. Torch then says that it costs time.
        exact = DistributedDataParallelKwargs(find_unused_parameters=True)
        warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")

        self.place = place
        self.objective = objective
        self.clip = optimizer.clip
        self.accelerator = Accelerator(
            mixed_precision="bf16" if config.precision == "bf16" else "no",
            cpu=place.device.type == "cpu",
            kwargs_handlers=[exact],
        )
        self.accumulation = plan.accumulation
        self.optimizer = optimizers.build(objective.to(place.device), optimizer)
        self.model = self.accelerator.prepare_model(objective)

    def forward(self, batch: Batch, ctx: StepContext, *, last: bool) -> StepOutput:
        # data parallelism decides in the forward whether the backward will be followed by a reduction
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            return self.model(batch, ctx)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            self.accelerator.backward(loss / self.accumulation)

    def update(self, lr: float) -> Tensor:
        optimizers.set_lr(self.optimizer, lr)
        norm = torch.nn.utils.clip_grad_norm_(self.objective.parameters(), self.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def slots(self) -> list[Slot]:
        named = self.objective.named_parameters()
        return [Slot(n, tuple(p.shape), 0, p.numel(), p, 0) for n, p in named if p.requires_grad]
