"""Holding a batch against what an objective says it needs."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pipeline.core.batch import several
from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch

_SPEC = re.compile(r"(\w+)\[([\w,]*)\]")


def check_batch(needs: Mapping[str, str], batch: Batch, objective: str) -> None:
    """Check fields, types and shapes. Letters in a shape are sizes: the same letter, the same size.

    Args:
        needs: ``{"image": "uint8[B,3,H,W]"}``.
        batch: the first batch of a run.
        objective: its name, for the message.

    Raises:
        ConfigError: with every field that does not fit.
    """
    problems: list[str] = []
    sizes: dict[str, int] = {}
    for field, spec in needs.items():
        match = _SPEC.fullmatch(spec)
        assert match is not None, f"{objective} needs {field}: {spec!r} is not like 'uint8[B,3,H,W]'"
        if field not in batch:
            problems.append(f"{field!r} is not in the batch; add it to data.fields (it has {', '.join(sorted(batch))})")
            continue
        value, (dtype, shape) = batch[field], match.groups()
        if several(batch, field):  # for each sample of the first data set
            value = value[:, 0]
        letters = shape.split(",")
        fits = len(letters) == value.ndim and all(
            size == (int(letter) if letter.isdigit() else sizes.setdefault(letter, size))
            for letter, size in zip(letters, value.shape, strict=True)
        )
        if not fits or str(value.dtype) != f"torch.{dtype}":
            found = f"{str(value.dtype)[6:]}[{','.join(map(str, value.shape))}]"
            problems.append(f"{field!r} must be {spec}, the stream gives {found}")
    if problems:
        raise ConfigError(f"objective {objective!r} does not fit the data: " + "; ".join(problems))
