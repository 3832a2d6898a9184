"""State as fragments of named, flattened tensors: the one form in which engines hand it to checkpoints.

A checkpoint made by any engine, ZeRO stage and world size can so be read by any other: what is written is "elements
a to b of the tensor called N", never "the partition of rank 3".

Names: ``model/NAME`` for parameters (the fp32 master's value) and buffers, ``optimizer/STATE/NAME`` for the
optimizer's state of parameter NAME ("exp_avg", "exp_avg_sq", "step", ...), ``ema/NAME`` for its moving average.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.core.protocols import Objective

MODEL = "model"
OPTIMIZER = "optimizer"
EMA = "ema"


class Fragment(NamedTuple):
    """A live view of a run of elements of a named tensor: what is copied into it changes the engine's state."""

    name: str
    start: int
    """First element, in the flattened whole."""
    data: Tensor
    """The elements, one dimension."""
    shape: tuple[int, ...]
    """Of the whole."""


class Slot(NamedTuple):
    """Where this rank's part of a trainable parameter lives in what the optimizer updates."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    """First element of this part, in the flattened parameter."""
    count: int
    updated: Tensor
    """The tensor that the optimizer updates and keys its state by: the parameter, or a flat partition of many."""
    offset: int
    """Of this part in ``updated``, flattened."""


class Spec(NamedTuple):
    """Shape and type of a whole named tensor."""

    shape: tuple[int, ...]
    dtype: str


def whole(name: str, tensor: Tensor) -> Fragment:
    """A fragment that is all of ``tensor`` (which must be contiguous, so that the view is live)."""
    return Fragment(name, 0, tensor.detach().view(-1), tuple(tensor.shape))


def share(fragment: Fragment, rank: int, world_size: int) -> Fragment | None:
    """This rank's part of what all ranks hold; None when there are fewer elements than ranks and none is left."""
    size = fragment.data.numel()
    first, end = size * rank // world_size, size * (rank + 1) // world_size
    if first == end:
        return None
    return fragment._replace(start=fragment.start + first, data=fragment.data[first:end])


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers that checkpoints hold: not those of parts that only their origin holds.

    What is shared under several names is there under the first.
    """
    frozen = module.frozen() if isinstance(module, Objective) else {}
    rebuilt = tuple(f"{part}." for part, origin in frozen.items() if not origin.kept)
    tensors = {n: t for n, t in module.state_dict(keep_vars=True).items() if not n.startswith(rebuilt)}
    seen: dict[int, str] = {}
    for name, tensor in tensors.items():
        seen.setdefault(id(tensor), name)
    return {name: tensor for name, tensor in tensors.items() if seen[id(tensor)] == name}


def untrained(module: nn.Module) -> Iterator[Fragment]:
    """Persistent buffers and frozen parameters, held by every rank."""
    for name, tensor in named_tensors(module).items():
        if not tensor.requires_grad:
            yield whole(f"{MODEL}/{name}", tensor)


def trained(slots: Iterable[Slot], optimizer: torch.optim.Optimizer, *, writing: bool) -> Iterator[Fragment]:
    """This rank's parts of the trainable parameters and of the optimizer's state.

    A count of steps belongs to all elements of a parameter: all who hold some read it, who holds the first writes it.
    """
    for slot in slots:
        end = slot.offset + slot.count
        yield Fragment(
            f"{MODEL}/{slot.name}", slot.start, slot.updated.detach().view(-1)[slot.offset : end], slot.shape
        )
        for key, value in optimizer.state.get(slot.updated, {}).items():
            name = f"{OPTIMIZER}/{key}/{slot.name}"
            if value.ndim == 0:
                if slot.start == 0 or not writing:
                    yield Fragment(name, 0, value.view(1), ())
            else:
                yield Fragment(name, slot.start, value.view(-1)[slot.offset : end], slot.shape)


def make_state(slots: Iterable[Slot], optimizer: torch.optim.Optimizer, specs: dict[str, Spec]) -> None:
    """Give the optimizer empty state of the kinds that a checkpoint holds, ready to be filled.

    Args:
        slots: this rank's.
        optimizer: not yet stepped, or of the same kinds of state.
        specs: the checkpoint's tensors.
    """
    kinds = {name.split("/", 2)[1] for name in specs if name.startswith(OPTIMIZER + "/")}
    for slot in slots:
        state = optimizer.state[slot.updated]
        for key in kinds:
            spec = specs.get(f"{OPTIMIZER}/{key}/{slot.name}")
            if spec is None or key in state:
                continue
            dtype = getattr(torch, spec.dtype)
            if spec.shape == () and slot.shape != ():
                state[key] = torch.zeros((), dtype=dtype, device=slot.updated.device)
            else:
                state[key] = torch.zeros_like(slot.updated, dtype=dtype, requires_grad=False)
