"""Accelerate: one process to a few GPUs. The only file that knows it.

Precision and placement are Accelerate's. The gradients are averaged here, in buckets of a fixed order after the last
backward, and not by torch's DistributedDataParallel: that one rebuilds its buckets after the first step, so that a
resumed run adds in another order than an undisturbed one and differs in the last bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from pipeline.config.resolve import Plan
from pipeline.config.schema import EngineConfig
from pipeline.config.schema import Optimizer as OptimizerConfig
from pipeline.core.protocols import Batch, Objective, StepContext
from pipeline.dist.group import Place
from pipeline.engine import optimizers
from pipeline.engine.asked import Built
from pipeline.engine.base import SingleEngine
from pipeline.engine.fragments import Slot

BUCKET_ELEMENTS = 2**24


class AccelerateEngine(SingleEngine):
    """The objective under Accelerate; bf16 is autocast over fp32 parameters."""

    replicated = True

    def __init__(
        self, objective: Objective, config: EngineConfig, optimizer: OptimizerConfig, plan: Plan, place: Place
    ) -> None:
        from accelerate import Accelerator

        self.place = place
        self.objective = objective
        self.precision = config.precision
        self.clip = optimizer.clip
        self.accumulation = plan.accumulation
        self.accelerator = Accelerator(
            mixed_precision="bf16" if config.precision == "bf16" else "no", cpu=place.device.type == "cpu"
        )
        self.optimizer = optimizers.build(objective.to(place.device), optimizer, plan.frozen)
        self.names = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        for tensor in objective.state_dict().values():  # all ranks begin as rank 0 does
            dist.broadcast(tensor, src=0)
        # evaluation_mode: no DistributedDataParallel
        self.model = self.accelerator.prepare_model(objective, evaluation_mode=True)

    @override
    def built(self) -> Built:
        import accelerate
        from accelerate.utils import DistributedType, DynamoBackend

        state = self.accelerator.state
        plain = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        compiler = state.dynamo_plugin.backend if state.dynamo_plugin else DynamoBackend.NO
        settings = {
            "precision": {"no": "fp32"}.get(state.mixed_precision, state.mixed_precision),
            # Both divide the loss.
            "accumulation": self.accumulation * self.accelerator.gradient_accumulation_steps,
            "parallelism": "none" if state.distributed_type in plain else state.distributed_type.value,
            "compiler": "none" if compiler is DynamoBackend.NO else compiler.value,
        }
        places = {id(p): number for number, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        groups = {name: places[id(p)] for name, p in self.objective.named_parameters() if id(p) in places}
        return Built(f"Accelerate {accelerate.__version__}", self.optimizer, groups, settings)

    @override
    def call(self, batch: Batch, ctx: StepContext, **how: Any) -> Any:
        return self.model(batch, ctx, **how)

    @override
    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.accelerator.backward(loss / self.accumulation)
        if last and self.place.world_size > 1:
            self._average()

    def _average(self) -> None:
        """Replace every gradient by its mean over the ranks; a parameter that a rank did not use counts as zero."""
        pending = []
        for bucket in self._buckets():
            for p in bucket:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            flat = torch.cat([p.grad.reshape(-1) for p in bucket if p.grad is not None])
            pending.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        for bucket, flat, work in pending:
            assert work is not None
            work.wait()
            flat /= self.place.world_size
            for p, mean in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                p.grad = mean.view_as(p)

    def _buckets(self) -> Iterator[list[Tensor]]:
        """The trainable parameters, in their order, in runs of about BUCKET_ELEMENTS."""
        bucket: list[Tensor] = []
        for p in self.names.values():
            bucket.append(p)
            if sum(q.numel() for q in bucket) >= BUCKET_ELEMENTS:
                yield bucket
                bucket = []
        if bucket:
            yield bucket

    @override
    def update(self, lr: float) -> Tensor:
        optimizers.set_lr(self.optimizer, lr)
        norm = optimizers.clip(self.names.values(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    @override
    def slots(self) -> list[Slot]:
        return [Slot(n, tuple(p.shape), 0, p.numel(), p, 0) for n, p in self.names.items()]
