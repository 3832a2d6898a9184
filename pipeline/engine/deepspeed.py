"""DeepSpeed, ZeRO 0 to 3. The only file that knows it; its JSON is derived from the config and kept nowhere else.

bf16 is DeepSpeed's ``torch_autocast``: parameters and optimizer state stay fp32, matrix products and their
communication are bf16. What is worked around is said where it is done; facts are of DeepSpeed 0.19.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pipeline.config.resolve import Plan
from pipeline.config.schema import EngineConfig
from pipeline.config.schema import Optimizer as OptimizerConfig
from pipeline.core.protocols import Average, Batch, Objective, StepContext
from pipeline.dist.group import Place
from pipeline.engine import optimizers
from pipeline.engine.asked import Built
from pipeline.engine.base import SingleEngine
from pipeline.engine.fragments import MODEL, Fragment, Slot, named_tensors


def settings(engine: EngineConfig, optimizer: OptimizerConfig, plan: Plan) -> dict[str, Any]:
    """DeepSpeed's JSON. Everything whose default changed between its versions is written out."""
    # ZeRO 0 in fp32 clips without telling the norm, so there we clip ourselves (see `update`).
    clip = optimizer.clip or 0.0
    return {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": clip if engine.zero > 0 else 0.0,
        "zero_optimization": {"stage": engine.zero, "overlap_comm": torch.cuda.is_available()},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": engine.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 2**31,
    }


def _import(timeout: timedelta) -> Any:
    """Import DeepSpeed, quiet, and without what it needs only for inference."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import groups, logger

    logger.setLevel(logging.WARNING)
    # Asked for one, it would try all of its compiled operators with a compiler; and on CPU its start would build a
    # shared-memory all-reduce (half a minute, needs ninja) that training never calls, and that leaves files in
    # /dev/shm when a rank is killed. It uses none: there are none.
    deepspeed.ops.__dict__["__compatible_ops__"] = {}
    # At every step ZeRO imports Muon, if only to ask whether it is the optimizer, and importing that compiles its
    # kernels: seconds of every start, in every rank.
    for module, wanted in (("muon_optimizer", "MuonWithAuxAdam"), ("original_muon", "muon_update")):
        name = f"deepspeed.runtime.zero.muon.{module}"
        stand_in = ModuleType(name)
        setattr(stand_in, wanted, type(wanted, (), {}))
        sys.modules.setdefault(name, stand_in)
    # It calls two collectives by the names that torch has replaced.
    renamed = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", renamed, FutureWarning)
    # It would make a clone of the world with torch's default time-out, so that ours never reached the gradients.
    groups._WORLD_GROUP = torch.distributed.new_group(timeout=timeout)
    return deepspeed


class DeepSpeedEngine(SingleEngine):
    """The objective under DeepSpeed."""

    def __init__(
        self, objective: Objective, config: EngineConfig, optimizer: OptimizerConfig, plan: Plan, place: Place
    ) -> None:
        deepspeed = _import(place.timeout)
        self.version = deepspeed.__version__
        self.objective = objective.to(place.device)
        self.place = place
        self.stage = config.zero
        self.precision = config.precision
        self.clip = optimizer.clip
        self.replicated = config.zero == 0
        # DeepSpeed hangs its own attributes on parameters, so to a type checker they are anything.
        self.names: dict[str, Any] = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        self._shapes = {id(p): tuple(p.shape) for p in objective.parameters()}
        saved = named_tensors(objective)
        untrained = ((n, p) for n, p in objective.named_parameters() if n in saved and not p.requires_grad)
        frozen: dict[str, Any] = {f"{MODEL}/{name}": p for name, p in untrained}
        self._frozen_parts = frozen if config.zero == 3 else {}
        self.optimizer = optimizers.build(objective, optimizer, plan.frozen)
        self.engine, *_ = deepspeed.initialize(
            model=objective,
            optimizer=self.optimizer,
            config=settings(config, optimizer, plan),
            dist_init_required=False,
        )

    @override
    def built(self) -> Built:
        stepped = self.engine.optimizer
        while not isinstance(stepped, torch.optim.Optimizer):
            stepped = stepped.optimizer
        half = str(self.engine.torch_autocast_dtype()).replace("torch.bfloat16", "bf16")
        precisions = {
            "fp16": self.engine.fp16_enabled(),
            "bf16 parameters": self.engine.bfloat16_enabled(),
            half: self.engine.torch_autocast_enabled(),
        }
        settings = {
            "precision": ", ".join(name for name, enabled in precisions.items() if enabled) or "fp32",
            "accumulation": self.engine.gradient_accumulation_steps(),
            "micro-batch": self.engine.train_micro_batch_size_per_gpu(),
            "global batch": self.engine.train_batch_size(),
            "parallelism": f"ZeRO {self.engine.zero_optimization_stage()}",
            "clip": self.engine.gradient_clipping(),
            "compiler": "torch.compile" if self.engine.is_compiled else "none",
        }
        return Built(f"DeepSpeed {self.version}", stepped, self._groups(stepped), settings)

    def _groups(self, stepped: torch.optim.Optimizer) -> dict[str, int]:
        """Number of the group of each parameter of which this rank has a part."""
        zero = self.engine.optimizer
        if self.stage == 3:
            numbers = ((n, zero.grad_position[zero.get_param_id(p)][0]) for n, p in self.names.items())
            return {name: zero.sub_group_to_group_id[number] for name, number in numbers}
        if self.stage > 0:
            mapped = ((n, p._hp_mapping) for n, p in self.names.items())
            return {name: here.param_group_index for name, here in mapped if here is not None}
        places = {id(p): number for number, group in enumerate(stepped.param_groups) for p in group["params"]}
        return {name: places[id(p)] for name, p in self.names.items()}

    @override
    def call(self, batch: Batch, ctx: StepContext, **how: Any) -> Any:
        return self.engine(batch, ctx, **how)

    @override
    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.engine.backward(loss)
        if not last:
            self.engine.step()  # not a step: it counts the micro-batch

    @override
    def update(self, lr: float) -> Tensor:
        optimizers.set_lr(self.optimizer, lr)
        if self.stage == 0:
            norm = optimizers.clip(self.names.values(), self.clip)
            self.engine.step()
            return norm
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        assert norm is not None, "DeepSpeed gave no gradient norm"
        return torch.as_tensor(norm, dtype=torch.float32, device=self.place.device)

    @override
    def slots(self) -> list[Slot]:
        if self.stage == 0:
            return [Slot(n, tuple(p.shape), 0, p.numel(), p, 0) for n, p in self.names.items()]
        return list(self._partitioned() if self.stage == 3 else self._flat())

    def _flat(self) -> Iterator[Slot]:
        """ZeRO 1 and 2: each group is one flat tensor, cut in as many parts as there are ranks."""
        for name, p in self.names.items():
            here = p._hp_mapping
            if here is not None:
                flat = self.engine.optimizer.single_partition_of_fp32_groups[here.param_group_index]
                first = here.lp_fragment_address
                yield Slot(name, tuple(p.shape), first.start, first.numel, flat, here.hp_fragment_address.start)

    def _partitioned(self) -> Iterator[Slot]:
        """ZeRO 3: each parameter is cut in as many parts as there are ranks, the last ones padded."""
        zero = self.engine.optimizer
        for name, p in self.names.items():
            group, offset, size = zero.grad_position[zero.get_param_id(p)]
            start = self.place.rank * size
            count = min(size, p.ds_numel - start)
            if count > 0:
                yield Slot(name, self.shape_of(p), start, count, zero.fp32_partitioned_groups_flat[group], offset)

    @override
    def shared(self) -> Iterator[Fragment]:
        for fragment in super().shared():
            if fragment.name not in self._frozen_parts:
                yield fragment

    @override
    def exclusive(self, *, writing: bool) -> Iterator[Fragment]:
        yield from super().exclusive(writing=writing)
        for name, p in self._frozen_parts.items():
            start = self.place.rank * p.ds_tensor.numel()
            count = min(p.ds_tensor.numel(), p.ds_numel - start)
            if count > 0:
                yield Fragment(name, start, p.ds_tensor.detach()[:count], self.shape_of(p))

    @override
    def shape_of(self, tensor: Tensor) -> tuple[int, ...]:
        return self._shapes.get(id(tensor), tuple(tensor.shape))

    @override
    def publish(self) -> None:
        zero = self.engine.optimizer
        if self.stage in (1, 2):
            zero.update_lp_params()
        elif self.stage == 3:
            for group in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            self._gather_persistent()

    def _gather_persistent(self) -> None:
        """Under ZeRO 3, renew the small parameters that every rank holds whole from their parts."""
        persistent = self.engine.optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    @override
    def follow(self, averages: Iterable[Average]) -> None:
        if self.stage < 3:
            super().follow(averages)
            return
        # Equal shapes are cut alike, so each rank can average the parts that it holds.
        followers: list[tuple[Any, Any, float]] = [(a.target, a.source, a.keep) for a in averages]
        for target, source, keep in followers:
            target.ds_tensor.lerp_(source.ds_tensor, 1 - keep)
        if followers:
            self._gather_persistent()

    @override
    def hold(self, limits: Mapping[str, tuple[float, float]]) -> None:
        super().hold(limits)
        if limits and self.stage == 3:
            for name in limits.keys() & self.names.keys():
                self.names[name].ds_tensor.clamp_(*limits[name])
            self._gather_persistent()

    @override
    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.objective.parameters())):
            yield
