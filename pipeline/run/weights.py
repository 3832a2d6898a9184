"""A model's weights from checkpoints: as they were trained, averaged, or averaged anew to any width."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from pipeline.config.schema import RunConfig, Weights
from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.core.protocols import DataFacts, Objective
from pipeline.dist.group import Place
from pipeline.engine.checkpoint import CHECKPOINTS, MANIFEST, PREFIX, CheckpointStore, Saved, read_manifest, verify_file
from pipeline.engine.ema import power_name
from pipeline.engine.fragments import EMA, MODEL, Spec, named_tensors, whole
from pipeline.nn.ema import gamma_of, posthoc
from pipeline.nn.weights import no_initial_weights
from pipeline.run import frozen
from pipeline.run.build import build_objective, check_model


class Restored(NamedTuple):
    """A trained model, on the CPU."""

    objective: Objective
    config: RunConfig
    """Of the run that saved it."""
    facts: DataFacts
    saved: Saved
    """Where it comes from."""


def restore(run: Path, checkpoint: str | None, place: Place, weights: Weights = MODEL) -> Restored:
    """A run's objective with the weights of a checkpoint.

    Args:
        run: run folder.
        checkpoint: one of its checkpoints; None: the newest whole one.
        place: of this process.
        weights: see :func:`load_weights`.

    Raises:
        ConfigError: the run has no checkpoint.
        CheckpointError: the named one is not whole, or not of this program.
    """
    saved = _find(run, checkpoint, place)
    config = RunConfig.model_validate(saved.state["config"])
    facts = DataFacts.of(saved.state["facts"])
    with no_initial_weights():
        objective = build_objective(config, facts, str(saved.folder))
    frozen.leave_out(objective)
    load_weights(objective, saved, place.rank, weights)
    return Restored(objective, config, facts, saved)


def _find(run: Path, named: str | None, place: Place) -> Saved:
    """The checkpoint that was named, or the newest whole one of the run."""
    if named is not None:
        saved = read_manifest(Path(named))
        for name, facts in saved.files.items():
            verify_file(saved.folder / name, facts)
        return saved
    newest = CheckpointStore(run / CHECKPOINTS, place, lambda text: print(text, file=sys.stderr)).newest()
    if newest is None:
        raise ConfigError(f"{run} holds no checkpoint; train it first (sluice eval --random-init needs none)")
    return newest


def parse_weights(text: str) -> Weights:
    """ "model", "ema", or a relative width like "0.05".

    Raises:
        ConfigError: something else.
    """
    try:
        return TypeAdapter[Weights](Weights).validate_strings(text)
    except ValidationError:
        raise ConfigError(
            f"--weights {text}: write model, ema, or the relative width of an average, above 0 and below 0.28"
        ) from None


def load_weights(objective: Objective, saved: Saved, rank: int, weights: Weights = MODEL) -> None:
    """Fill a whole model from a checkpoint, whatever engine and world size wrote it.

    Args:
        objective: to be filled, on the CPU.
        saved: the checkpoint.
        rank: of this process.
        weights: "model" as trained; "ema", the moving average; a number, the power-function average of that relative
            width up to this checkpoint, made from those in all checkpoints of the run.

    Raises:
        CheckpointError: another model, or no such average.
    """
    tensors = named_tensors(objective)
    check_model(saved, {f"{MODEL}/{n}": Spec(tuple(t.shape), str(t.dtype)[6:]) for n, t in tensors.items()})
    saved.fill([whole(f"{MODEL}/{name}", tensor) for name, tensor in tensors.items()], rank)
    if isinstance(weights, float):
        _fill_posthoc(tensors, saved, rank, weights)
    elif weights == EMA:
        saved.fill([whole(f"{EMA}/{name}", tensors[name]) for name in _averaged(tensors, saved, EMA)], rank)


def _averaged(tensors: dict[str, Tensor], saved: Saved, prefix: str) -> list[str]:
    """Names of the tensors of which there is an average; what is not trained has none."""
    names = [name for name in tensors if f"{prefix}/{name}" in saved.tensors]
    if not names:
        kinds = sorted({stored.partition("/")[0] for stored in saved.tensors} - {"optimizer"})
        raise CheckpointError(f"{saved.folder} holds no weights {prefix!r}, only {', '.join(kinds)}; see [ema]")
    return names


def _fill_posthoc(tensors: dict[str, Tensor], saved: Saved, rank: int, width: float) -> None:
    """Least-squares reconstruction from all power-function averages of the run up to ``saved``."""
    prefixes = sorted({n.partition("/")[0] for n in saved.tensors if n.startswith(power_name(0.0)[:-1])})
    if not prefixes:
        raise CheckpointError(f"{saved.folder} holds no power-function averages; train with ema.power = [0.05, 0.1]")
    folders = [path.parent for path in sorted(saved.folder.parent.glob(f"{PREFIX}*/{MANIFEST}"))]
    run = [read_manifest(folder) for folder in folders if folder.suffix != ".tmp"]
    # At the first update all averages are the weights themselves, so that two widths are one.
    averaged = {name for name in saved.tensors if name.partition("/")[0] in prefixes}
    earlier = [s for s in run if 1 < s.step <= saved.step and s.tensors.keys() >= averaged]
    for source in earlier:
        for name, facts in source.files.items():
            verify_file(source.folder / name, facts)
    sources = [(source, prefix) for source in earlier for prefix in prefixes]
    kept = [(s.step, gamma_of(float(p.partition("-")[2]))) for s, p in sources]
    factors = posthoc(kept, (saved.step, gamma_of(width)))
    names = _averaged(tensors, saved, prefixes[0])
    values = {name: tensors[name].detach() for name in names}
    sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in values.items()}
    for (source, prefix), factor in zip(sources, factors, strict=True):
        source.fill([whole(f"{prefix}/{name}", value) for name, value in values.items()], rank)
        for name, value in values.items():
            sums[name] += factor * value.double()
    for name, value in values.items():
        value.copy_(sums[name])
