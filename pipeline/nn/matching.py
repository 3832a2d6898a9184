"""Weights of one model given to another: which tensor goes where, what is resampled, and what is left over.

Shape letters: D width, H, W height and width of a grid of patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor, nn

from pipeline.core.errors import CheckpointError
from pipeline.nn.encoder import Backbone, ImageEncoder

POOLED_NORM = ("fc_norm.", "norm.")
"""A norm before or after the pooling: models that pool in another way have the one and not the other."""
FOREIGN = ("head.", "head_dist.", *POOLED_NORM)
"""What the backbone of a file may have beside this one: its classifier, and the other norm."""


@dataclass
class Match:
    """What becomes of two sets of names."""

    values: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Ours to a tensor of our shape."""
    resized: list[str] = field(default_factory=list[str])
    """Ours, resampled to our size of image or patch."""
    own: list[str] = field(default_factory=list[str])
    """Ours, computed and not trained, and of another size there: they stay as they are."""
    missing: list[str] = field(default_factory=list[str])
    """Ours, of which there is nothing there."""
    skipped: list[str] = field(default_factory=list[str])
    """Ours, that were not to be taken."""
    unexpected: list[str] = field(default_factory=list[str])
    """Theirs, for which there is no place."""

    @property
    def counts(self) -> dict[str, int]:
        """Of each kind."""
        kinds = {
            "matched": self.values,
            "resized": self.resized,
            "kept as computed": self.own,
            "missing": self.missing,
            "skipped": self.skipped,
            "unexpected": self.unexpected,
        }
        return {kind: len(names) for kind, names in kinds.items()}


def backbones(module: nn.Module, encoders: Iterable[nn.Module]) -> dict[str, Backbone]:
    """The timm backbones of an objective's encoders, by what stands before their names in it: "encoder.backbone."."""
    places = {id(inner): name for name, inner in module.named_modules()}
    found = {}
    for encoder in encoders:
        for inner in encoder.modules():
            if isinstance(inner, ImageEncoder) and id(inner.backbone) in places:
                found[f"{places[id(inner.backbone)]}."] = inner.backbone
    return found


def pair(prefixes: Mapping[str, Backbone], theirs: Iterable[str], evaluated: Iterable[str] = ()) -> dict[str, str]:
    """Which of their prefixes stands for which of ours: the one with most of the backbone's names.

    Of equals one of ``evaluated``, their prefixes of what evaluations use (DINO's teacher, not its student); then ours.

    Returns:
        Ours to theirs, where they are not the same.
    """
    names, known = set(theirs), set(evaluated)
    found = {}
    for prefix, backbone in prefixes.items():
        wanted = list(backbone.state_dict())
        ends = {name[: -len(end)] for name in names for end in wanted if name.endswith(end)}
        if ends:
            rank = {p: (sum(p + name in names for name in wanted), p in known, p == prefix) for p in sorted(ends)}
            best = max(rank, key=rank.__getitem__)
            if best != prefix:
                found[prefix] = best
    return found


def match(
    wanted: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    parts: Mapping[str, str],
    skip: Iterable[str],
    prefixes: Mapping[str, Backbone],
    old_grid: tuple[int, int] | None,
    origin: str,
) -> Match:
    """Find a tensor of theirs for each of ours.

    Args:
        wanted: ours by name.
        theirs: by name.
        parts: our prefixes to theirs; empty: names are the same.
        skip: our prefixes that take nothing.
        prefixes: of our backbones.
        old_grid: rows and columns of their position tables; None: square.
        origin: theirs, in a message.

    Raises:
        CheckpointError: nothing fits; a backbone is another one; or a tensor has another shape.
    """
    found, used = Match(), set[str]()
    for name, tensor in wanted.items():
        source = _source(name, parts)
        if name.startswith(tuple(skip)):
            found.skipped.append(name)
            used.add(source or "")
        elif source is None or source not in theirs:
            found.missing.append(name)
        else:
            used.add(source)
            _take(found, name, tensor, theirs[source], _owner(name, prefixes), old_grid, origin)
    found.unexpected = [name for name in theirs if name not in used]
    if not found.values:
        raise CheckpointError(
            f"nothing in {origin} fits this model: there it is {', '.join(list(theirs)[:3])}, ..., here "
            f'{", ".join(list(wanted)[:3])}, ...; say which part is which: start.parts = {{"encoder." = "visual."}}'
        )
    for prefix, backbone in prefixes.items():
        _check_backbone(found, prefix, _source(prefix, parts), backbone, origin)
    return found


def _source(name: str, parts: Mapping[str, str]) -> str | None:
    """Their name for ours; None: no part has it."""
    if not parts:
        return name
    ours = max((prefix for prefix in parts if name.startswith(prefix)), key=len, default=None)
    return None if ours is None else parts[ours] + name.removeprefix(ours)


def _owner(name: str, prefixes: Mapping[str, Backbone]) -> tuple[str, Backbone] | None:
    """Name within its backbone, and that; None: it is in none."""
    return next(((name.removeprefix(p), b) for p, b in prefixes.items() if name.startswith(p)), None)


def _take(
    found: Match,
    name: str,
    ours: Tensor,
    value: Tensor,
    owner: tuple[str, Backbone] | None,
    old_grid: tuple[int, int] | None,
    origin: str,
) -> None:
    if value.shape != ours.shape:
        if not ours.requires_grad and name.endswith("pos_embed"):  # sines, which no training has changed
            found.own.append(name)
            return
        resampled = None if owner is None else _resampled(owner[0], owner[1], value, old_grid)
        if resampled is None or resampled.shape != ours.shape:
            raise CheckpointError(
                f"{origin}: {name} is {list(value.shape)} there and {list(ours.shape)} here; set the objective as it "
                f'was trained, or leave it as it is drawn: start.skip = ["{name.rpartition(".")[0] or name}."]'
            )
        value = resampled
        found.resized.append(name)
    found.values[name] = value


def _resampled(name: str, backbone: Any, value: Tensor, old_grid: tuple[int, int] | None) -> Tensor | None:
    """A position table on the backbone's grid, or a patch embedding of its size of patch; None: it is neither."""
    if name == "patch_embed.proj.weight" and value.ndim == 4:
        return resample_patch_embed(value, list(backbone.patch_embed.proj.weight.shape[2:]))
    if name != "pos_embed" or not hasattr(backbone, "patch_embed"):
        return None
    prefix = 0 if getattr(backbone, "no_embed_class", False) else backbone.num_prefix_tokens
    cells = value.shape[1] - prefix
    old = old_grid or (math.isqrt(cells),) * 2
    if old[0] * old[1] != cells:
        return None
    new = list(backbone.patch_embed.grid_size)
    return resample_abs_pos_embed(value, new_size=new, old_size=list(old), num_prefix_tokens=prefix)


def _check_backbone(found: Match, prefix: str, source: str | None, backbone: Backbone, origin: str) -> None:
    """A backbone that is filled in part only, or from a deeper one, is another model.

    Raises:
        CheckpointError: it is.
    """
    if not any(name.startswith(prefix) for name in found.values):
        return
    own = [name.removeprefix(prefix) for name in found.missing if name.startswith(prefix)]
    absent = [name for name in own if not name.startswith(POOLED_NORM)]
    roots = {name.partition(".")[0] for name in backbone.state_dict()}
    rest = [name.removeprefix(source or "") for name in found.unexpected if name.startswith(source or "")]
    surplus = [name for name in rest if name.partition(".")[0] in roots and not name.startswith(FOREIGN)]
    if absent or surplus:
        raise CheckpointError(
            f"{origin} is of another backbone than {prefix.rstrip('.')}, a {type(backbone).__name__}: {len(absent)} "
            f"tensors are missing{_some(absent)}, {len(surplus)} are not expected{_some(surplus)}; set the objective "
            "as it was trained, or name what to leave as it is drawn in start.skip"
        )


def _some(names: list[str]) -> str:
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
