"""What a run would hold, send and save: the part of `sluice plan` that needs the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from pipeline.config import load
from pipeline.config.exitcodes import FINISHED
from pipeline.config.resolve import resolve
from pipeline.config.schema import RunConfig
from pipeline.core.manifest import Manifest
from pipeline.core.protocols import Batch, Clock, Objective, StepContext
from pipeline.data.dataset import open_data
from pipeline.data.facts import facts
from pipeline.dist.group import process_group
from pipeline.engine.footprint import Sizes, checkpoint_bytes, gathered, held, sent
from pipeline.engine.fragments import named_tensors
from pipeline.run.build import build_objective, sample_batch

_HALVED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Of these alone, not of classes made from them, does DeepSpeed's autocast send gradients in bf16."""
PROBED = (2, 4)
"""Samples of the two forwards from which the activations of any micro-batch follow."""


@dataclass(frozen=True)
class Cost:
    """Bytes, unless another unit is named."""

    trained: int
    """Parameters."""
    frozen: int
    """Parameters."""
    weights: int
    gradients: int
    optimizer: int
    master: int
    ema: int
    activations: int
    """Kept by autograd for the backward of one micro-batch; an estimate, from forwards on this machine."""
    gathered: int
    """ZeRO 3: parameters that are whole only while they are used, at most; an upper bound."""
    sent: int | None
    """By each rank in a step, for gradients and parameters; None under ZeRO 3."""
    checkpoint: int


def sizes_of(objective: nn.Module) -> Sizes:
    """Of a model."""
    saved = named_tensors(objective)
    tensors = saved.values()
    parameters = list(objective.parameters())
    known = {id(p) for p in parameters}
    layers = [m for m in objective.modules() if type(m) in _HALVED]
    return Sizes(
        trained=[p.numel() for p in parameters if p.requires_grad],
        frozen=[p.numel() for p in parameters if not p.requires_grad],
        halved=sum(p.numel() for m in layers for p in m.parameters(recurse=False) if p.requires_grad),
        rebuilt=sum(p.numel() for n, p in objective.named_parameters(remove_duplicate=False) if n not in saved),
        buffers=sum(t.numel() * t.element_size() for t in tensors if id(t) not in known),
    )


def kept_for_backward(objective: Objective, batch: Batch, precision: str) -> int:
    """Bytes that autograd keeps of a forward, without parameters and buffers: of the phase that keeps most."""
    clock = Clock(0, 0, 1)
    contexts = [StepContext(0, clock, phase=phase) for phase in objective.phases() or [""]]
    return max(_kept_of(objective, batch, context, precision) for context in contexts)


def _kept_of(objective: Objective, batch: Batch, context: StepContext, precision: str) -> int:
    """Of one loss; each storage counts once."""
    own = {t.untyped_storage().data_ptr() for t in (*objective.parameters(), *objective.buffers(), *batch.values())}
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no storage's address is used a second time

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), bf16:
        objective(batch, context)
    return sum(found.values())


def activations(config: RunConfig, objective: Objective, manifest: Manifest) -> int:
    """Of one micro-batch: what two small forwards keep, continued in a straight line."""
    precision, batches = config.engine.precision, [sample_batch(config, manifest, samples) for samples in PROBED]
    few, more = (kept_for_backward(objective, batch, precision) for batch in batches)
    per_sample = (more - few) / (PROBED[1] - PROBED[0])
    return round(few + per_sample * (config.engine.micro_batch - PROBED[0]))


def cost(path: str, overrides: Sequence[str], world_size: int) -> int:
    """Print the cost of a run on ``world_size`` ranks, as JSON. Returns the exit code.

    Raises:
        ConfigError, DataError: the run could not begin.
    """
    config = load.load_run(path, overrides)
    manifest = open_data(config.data)
    plan = resolve(config, manifest.samples, world_size, path)
    with process_group(config.engine.timeout_minutes):
        objective = build_objective(config, facts(config.data, manifest), path)
        kept = activations(config, objective, manifest)
    sizes = sizes_of(objective)
    state = held(sizes, config.engine, config.optimizer, config.ema, world_size)
    found = Cost(
        trained=sum(sizes.trained),
        frozen=sum(sizes.frozen),
        **asdict(state),
        activations=kept,
        gathered=gathered(sizes, config.engine),
        sent=sent(sizes, config.engine, plan.accumulation, world_size),
        checkpoint=checkpoint_bytes(sizes, config.optimizer, config.ema),
    )
    print(json.dumps(asdict(found)))
    return FINISHED
