"""The data sets of a batch, one at a time."""

from __future__ import annotations

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch


def several(batch: Batch, field: str) -> bool:
    """Whether a field is of a data set beside the first with a ratio above 1: [B,ratio,...]."""
    own = [ids for name, ids in batch.items() if name.endswith("_id") and field.startswith(name.removesuffix("id"))]
    return any(ids.ndim == 2 for ids in own)


def batch_of(batch: Batch, name: str = "") -> Batch:
    """The samples of one data set under plain names: "target_image" of the data set "target" is "image".

    "id" and "epoch" are that data set's own, so that random numbers drawn for its samples belong to them.

    Where there are several of its samples for each of the first data set's (``ratio``), rows [B,ratio,...] become
    [B*ratio,...], those that came with a sample one after the other.

    Args:
        batch: of the stream.
        name: of a data set beside the first (``[data.beside.NAME]``); "": the first.

    Raises:
        ConfigError: there is no such data set in the batch.
    """
    beside = [field.removesuffix("_id") for field in batch if field.endswith("_id")]
    if not name:
        prefixes = tuple(f"{other}_" for other in beside)
        return {field: value for field, value in batch.items() if not field.startswith(prefixes)}
    if name not in beside:
        there = ", ".join(beside) or "none"
        raise ConfigError(f"there is no data set {name!r} beside the first (there: {there}); add [data.beside.{name}]")
    own = {field.removeprefix(f"{name}_"): value for field, value in batch.items() if field.startswith(f"{name}_")}
    return {field: value.flatten(0, 1) for field, value in own.items()} if own["id"].ndim == 2 else own
