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
from functools import partial

import torch
from torch import Tensor

from pipeline.core.protocols import Batch, Embeddings, PairwiseObjective, StepContext, StepOutput
from pipeline.engine.base import SingleEngine
from pipeline.nn.batch_norm import frozen_statistics


def accumulate(engine: SingleEngine, batches: Sequence[Batch], ctx: StepContext) -> Iterator[tuple[StepOutput, Batch]]:
    """Add the gradient of a step to the engine.

    Args:
        engine: of the objective.
        batches: this rank's micro-batches.
        ctx: of the step.

    Yields:
        Of each micro-batch what came out, and the batch on the device; of a pairwise objective that of all, each time,
        with the parts of its samples.
    """
    objective = engine.objective
    if isinstance(objective, PairwiseObjective) and objective.compares and len(batches) > 1:
        yield from _in_two_passes(engine, objective, [engine.move(batch) for batch in batches], ctx)
        return
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        moved = engine.move(batch)
        output = engine.forward(moved, ctx, last=last)
        engine.backward(output.loss, last=last)
        yield output, moved


def _in_two_passes(
    engine: SingleEngine, objective: PairwiseObjective, batches: list[Batch], ctx: StepContext
) -> Iterator[tuple[StepOutput, Batch]]:
    dice: list[list[Tensor]] = []
    parts: list[Embeddings] = []

    def keep(embeddings: Embeddings) -> None:
        # Kept here and not returned, since an engine may change the types of what a forward returns; and as copies,
        # since it may take the parameters away.
        parts.append(Embeddings(*({name: x.detach().clone() for name, x in part.items()} for part in embeddings)))

    with torch.no_grad(), frozen_statistics(objective):
        for batch in batches:
            dice.append(_generator_states(engine.place.device))
            engine.call(batch, ctx, then=keep)
    after = _generator_states(engine.place.device)
    output, gradients = _loss_of_all(objective, parts, ctx)
    sizes = [len(batch["id"]) for batch in batches]
    losses, features = (
        [None] * len(batches) if rows is None else rows.split(sizes) for rows in (output.losses, output.features)
    )
    for index, batch in enumerate(batches):
        _set_generators(engine.place.device, dice[index])
        scalar = engine.call(batch, ctx, then=partial(_times, gradients[index]))
        # The engine divides by the number of micro-batches; the loss of all is a mean already.
        engine.backward(scalar * len(batches), last=index == len(batches) - 1)
        yield output._replace(losses=losses[index], features=features[index]), batch
    _set_generators(engine.place.device, after)


def _loss_of_all(
    objective: PairwiseObjective, parts: list[Embeddings], ctx: StepContext
) -> tuple[StepOutput, list[Embeddings]]:
    """The loss of all micro-batches, and its gradient for each of them.

    What is shared has one gradient, of which each micro-batch carries an equal part.
    """
    whole = Embeddings({n: torch.cat([part.rows[n] for part in parts]) for n in parts[0].rows}, parts[0].shared)
    leaves = [x.requires_grad_() for part in whole for x in part.values() if x.is_floating_point()]
    output = objective.loss(whole, ctx)
    found = dict(zip(leaves, torch.autograd.grad(output.loss, leaves, allow_unused=True), strict=True))
    rows, shared = ({n: g for n, x in part.items() if (g := found.get(x)) is not None} for part in whole)
    sizes = [len(next(iter(part.rows.values()))) for part in parts]
    pieces = {name: gradient.split(sizes) for name, gradient in rows.items()}
    gradients = [
        Embeddings(
            {name: piece[index] for name, piece in pieces.items()},
            {name: gradient / len(parts) for name, gradient in shared.items()},
        )
        for index in range(len(parts))
    ]
    return output._replace(loss=output.loss.detach()), gradients


def _times(gradients: Embeddings, embeddings: Embeddings) -> Tensor:
    """A scalar whose gradient with respect to ``embeddings`` is ``gradients``."""
    products = [
        (value * known[name]).sum(dtype=None if value.dtype == torch.float64 else torch.float32)
        for value_of, known in zip(embeddings, gradients, strict=True)
        for name, value in value_of.items()
        if name in known
    ]
    return torch.stack(products).sum()


def _generator_states(device: torch.device) -> list[Tensor]:
    """Of torch's global generators: dropout in a model that does not draw per sample."""
    own = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *own]


def _set_generators(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
