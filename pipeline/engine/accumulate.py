"""One step's micro-batches, from forward to gradient.

For most objectives the loss of a batch is the mean of its micro-batches', and so is the gradient. A pairwise objective
compares samples across micro-batches; there the loss is computed once, in two passes (GradCache: Gao et al., "Scaling
Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021, arXiv 2101.06983):

1. embed all micro-batches without gradient; the loss of all embeddings, and its gradient with respect to them and to
   the tensors that the loss shares (the temperature);
2. embed each micro-batch again, with the same random numbers, and pull that gradient through.

Memory of activations is that of one micro-batch, at the cost of one forward more. How many micro-batches there are does
not change the gradient, but for batch norm, whose statistics are those of a micro-batch over all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pipeline.core.protocols import Batch, Embeddings, PairwiseObjective, StepContext, StepOutput
from pipeline.engine.base import BaseEngine
from pipeline.nn.batch_norm import frozen_statistics


def accumulate(engine: BaseEngine, batches: Sequence[Batch], ctx: StepContext) -> Iterator[tuple[StepOutput, Batch]]:
    """Add the gradient of a step to the engine.

    Args:
        engine: of the objective.
        batches: this rank's micro-batches.
        ctx: of the step.

    Yields:
        Of each micro-batch what came out, and the batch on the device; of a pairwise objective that of all, each time.
    """
    objective = engine.objective
    if isinstance(objective, PairwiseObjective) and len(batches) > 1:
        yield from _in_two_passes(engine, objective, [engine.move(batch) for batch in batches], ctx)
        return
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        moved = engine.move(batch)
        output = engine.forward(moved, ctx, last=last)
        engine.backward(output.loss, last=last)
        yield output, moved


def _in_two_passes(
    engine: BaseEngine, objective: PairwiseObjective, batches: list[Batch], ctx: StepContext
) -> Iterator[tuple[StepOutput, Batch]]:
    dice: list[list[Tensor]] = []
    parts: list[Embeddings] = []
    with torch.no_grad(), frozen_statistics(objective):
        for batch in batches:
            dice.append(_generator_states(engine.place.device))
            parts.append(engine.call(batch, ctx, embed_only=True))
    after = _generator_states(engine.place.device)
    output, gradients = _loss_of_all(objective, parts, ctx)
    for index, batch in enumerate(batches):
        _set_generators(engine.place.device, dice[index])
        scalar = engine.call(batch, ctx, upstream=gradients[index])
        # The engine divides by the number of micro-batches; the loss of all is a mean already.
        engine.backward(scalar * len(batches), last=index == len(batches) - 1)
        yield output, batch
    _set_generators(engine.place.device, after)


def _loss_of_all(
    objective: PairwiseObjective, parts: list[Embeddings], ctx: StepContext
) -> tuple[StepOutput, list[Embeddings]]:
    """The loss of all micro-batches, and its gradient for each of them.

    What is shared has one gradient, of which each micro-batch carries an equal part.
    """
    rows = {name: _wide(torch.cat([part.rows[name] for part in parts])).requires_grad_() for name in parts[0].rows}
    shared = {name: value.requires_grad_() for name, value in parts[0].shared.items()}
    output = objective.loss(Embeddings(rows, shared), ctx)
    found = torch.autograd.grad(output.loss, [*rows.values(), *shared.values()], allow_unused=True)
    named = {name: g for name, g in zip([*rows, *shared], found, strict=True) if g is not None}
    size = len(next(iter(parts[0].rows.values())))
    pieces = {name: named[name].split(size) for name in rows if name in named}
    gradients = [
        Embeddings(
            {name: piece[index] for name, piece in pieces.items()},
            {name: named[name] / len(parts) for name in shared if name in named},
        )
        for index in range(len(parts))
    ]
    return StepOutput(output.loss.detach(), output.metrics), gradients


def _wide(x: Tensor) -> Tensor:
    """At least fp32, so that the gradient is not rounded on its way between the passes."""
    return x if x.dtype == torch.float64 else x.float()


def _generator_states(device: torch.device) -> list[Tensor]:
    """Of torch's global generators: dropout in a model that does not draw per sample."""
    own = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *own]


def _set_generators(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
