"""What an engine holds on each rank and sends in each step, from the sizes of parameters alone.

All state is fp32: bf16 is autocast over fp32 parameters in both engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config.schema import EmaConfig, EngineConfig
from pipeline.config.schema import Optimizer as OptimizerConfig

FP32, BF16 = 4, 2
PERSISTENT = 100_000
"""Under ZeRO 3, parameters of at most so many elements are held whole on every rank (DeepSpeed's
``stage3_param_persistence_threshold``)."""
LIVE = 10**9
"""Under ZeRO 3, at most so many elements are whole at a time (DeepSpeed's ``stage3_max_live_parameters``)."""


@dataclass(frozen=True)
class Sizes:
    """Of a model: elements of each parameter, bytes of its persistent buffers."""

    trained: Sequence[int]
    frozen: Sequence[int]
    rebuilt: int
    """Elements of frozen parameters that checkpoints only name."""
    buffers: int
    halved: int
    """Trained elements of linear layers and convolutions, whose gradients ZeRO sends in bf16 under autocast."""


@dataclass(frozen=True)
class State:
    """Bytes on one rank, between two steps but for the gradients, which are there at the update."""

    weights: int
    gradients: int
    optimizer: int
    master: int
    """Second copy of the weights, which the optimizer updates."""
    ema: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.master + self.ema


def moments(optimizer: OptimizerConfig) -> int:
    """Tensors that the optimizer keeps per parameter."""
    if optimizer.name == "adamw":
        return 2
    return 1 if optimizer.name == "lars" or optimizer.momentum > 0 else 0


def stage_of(engine: EngineConfig) -> int:
    """ZeRO stage; 0 where every rank holds everything."""
    return engine.zero if engine.name == "deepspeed" else 0


def held(
    sizes: Sizes, engine: EngineConfig, optimizer: OptimizerConfig, ema: EmaConfig | None, world_size: int
) -> State:
    """Bytes of state on one rank.

    Args:
        sizes: of the model.
        engine: which, and its stage.
        optimizer: which.
        ema: None: no averages.
        world_size: ranks.
    """
    stage = stage_of(engine)
    all_trained, all_frozen = FP32 * sum(sizes.trained), FP32 * sum(sizes.frozen)
    part = -(-all_trained // world_size) if stage else all_trained
    weights = all_trained + all_frozen
    if stage == 3:
        whole = FP32 * sum(n for n in (*sizes.trained, *sizes.frozen) if n <= PERSISTENT)
        weights = part + -(-all_frozen // world_size) + whole
    averages = 0 if ema is None else 1 + len(ema.power)
    return State(
        weights=weights + sizes.buffers,
        gradients=part,
        optimizer=moments(optimizer) * part,
        master=part if stage else 0,
        ema=averages * part,
    )


def gathered(sizes: Sizes, engine: EngineConfig) -> int:
    """Under ZeRO 3, bytes of parameters that are whole only while they are used: at most all, or LIVE elements."""
    if stage_of(engine) < 3:
        return 0
    return FP32 * min(LIVE, sum(n for n in (*sizes.trained, *sizes.frozen) if n > PERSISTENT))


def checkpoint_bytes(sizes: Sizes, optimizer: OptimizerConfig, ema: EmaConfig | None) -> int:
    """Bytes of a checkpoint, all ranks together: the same for every engine and world size."""
    averages = 0 if ema is None else 1 + len(ema.power)
    copies = 1 + moments(optimizer) + averages
    return FP32 * (copies * sum(sizes.trained) + sum(sizes.frozen) - sizes.rebuilt) + sizes.buffers


def sent(sizes: Sizes, engine: EngineConfig, accumulation: int, world_size: int) -> int | None:
    """Bytes that each rank sends in a step for gradients and parameters, by ring algorithms.

    A ring sends (W-1)/W of what it gathers or scatters, and twice that of what it reduces for all. Objectives that
    compare samples over ranks send their embeddings besides.

    Args:
        sizes: of the model.
        engine: which, and its stage.
        accumulation: micro-batches per step.
        world_size: ranks, W.

    Returns:
        None under ZeRO 3, where what is gathered a second time depends on the order in which layers are used.
    """
    stage, ring = stage_of(engine), (world_size - 1) / world_size
    if stage == 3:
        return None
    everything = FP32 * sum(sizes.trained)
    gradients = everything
    if stage and engine.precision == "bf16":
        gradients -= (FP32 - BF16) * sizes.halved
    if stage == 0:
        return round(2 * ring * gradients)
    reductions = accumulation if stage == 2 else 1  # stage 1 reduces what it has added up
    return round(ring * (2 * reductions * gradients + everything))
