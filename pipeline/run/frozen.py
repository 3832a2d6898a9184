"""Frozen parts of an objective: filled from their files, named by hash in checkpoints, left out after training.

Those that encoders use are in checkpoints themselves, and stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from pipeline.core.errors import CheckpointError, ConfigError, SluiceError
from pipeline.core.protocols import Objective, Origin
from pipeline.dist.group import gather_objects
from pipeline.engine.checkpoint import Saved, sha256_of
from pipeline.nn.weights import read

STATE = "frozen"
"""Key of a checkpoint's state: part to path and sha256."""
Origins = dict[str, dict[str, str]]


def fill(objective: Objective) -> Origins:
    """Fill the frozen parts from their files, on every rank.

    Returns:
        Path and sha256 of each part's file, for :data:`STATE`.

    Raises:
        ConfigError: on every rank: a file is missing, changed, of another model, or not the same on all ranks.
    """
    found: Origins = {}
    problem = None
    try:
        for name, origin in objective.frozen().items():
            found[name] = {"path": origin.path, "sha256": _hash(name, origin)}
            if not origin.stored:
                _fill(name, objective.get_submodule(name), origin)
    except SluiceError as error:
        problem = str(error)
    told = gather_objects((found, problem))
    for rank, (_, said) in enumerate(told):
        if said is not None:
            raise ConfigError(said if told[0][1] == said else f"rank {rank}: {said}")
    for rank, (others, _) in enumerate(told):
        for name, facts in others.items():
            if facts["sha256"] != (first := told[0][0][name]["sha256"]):
                raise ConfigError(
                    f"the objective's {name}: {facts['path']} is not the same file on all nodes: sha256 "
                    f"{facts['sha256'][:12]} on rank {rank}, {first[:12]} on rank 0"
                )
    return found


def _hash(name: str, origin: Origin) -> str:
    if origin.stored and origin.sha256 is not None and not Path(origin.path).exists():
        return origin.sha256
    try:
        found = sha256_of(Path(origin.path))
    except OSError as error:
        raise ConfigError(
            f"the objective's {name}: cannot read {origin.path} ({error.strerror}); training needs this file, "
            "evaluation and export do not"
        ) from error
    if origin.stored and origin.sha256 != found:
        raise ConfigError(
            f"the objective's {name}: {origin.path} is changed: its sha256 is {found}, and the stored outputs are of "
            f"{origin.sha256}; embed again (sluice prep embed) into a new folder, or name the file that they are of"
        )
    if origin.sha256 not in (None, found):
        raise ConfigError(
            f"the objective's {name}: {origin.path} is changed: its sha256 is {found}, the configuration says "
            f"{origin.sha256}"
        )
    return found


def _fill(name: str, part: nn.Module, origin: Origin) -> None:
    if origin.fill is not None:
        try:
            origin.fill(origin.path)
        except SluiceError as error:
            raise ConfigError(f"the objective's {name}: {error}") from error
        return
    stored, wanted = read(origin.path)[0], part.state_dict()
    for key in sorted(stored.keys() | wanted.keys()):
        shapes = [tuple(side[key].shape) if key in side else "absent" for side in (stored, wanted)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"the objective's {name}: {origin.path} is of another model: {key} is {shapes[0]} there and "
                f"{shapes[1]} in the objective; name the file and the settings that it was made with"
            )
    part.load_state_dict(stored)


def check(saved: Saved, origins: Origins) -> None:
    """Hold the files against those that the run began with.

    Raises:
        CheckpointError: one has changed.
    """
    before: Mapping[str, Any] = saved.state.get(STATE, {})
    for name in sorted(before.keys() | origins.keys()):
        was, now = (side.get(name, {"path": "none", "sha256": "none"}) for side in (before, origins))
        if was["sha256"] != now["sha256"]:
            raise CheckpointError(
                f"the objective's {name} has changed since {saved.folder}: it came from {was['path']} with sha256 "
                f"{was['sha256'][:12]}, now {now['path']} has {now['sha256'][:12]}; name the file that the run began "
                "with, or start a new run in another folder"
            )


class Absent(nn.Module):
    """Stands where a frozen part was."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *args: object, **kwargs: object) -> NoReturn:
        """Nobody may ask for it."""
        raise AssertionError(f"{self.name} is not there outside training; no encoder may use it")


def leave_out(objective: Objective) -> None:
    """Take the frozen parts out that no checkpoint holds, for evaluation and export, which have not got their files."""
    for name in (part for part, origin in objective.frozen().items() if not origin.kept):
        parent, _, own = name.rpartition(".")
        setattr(objective.get_submodule(parent), own, Absent(name))
