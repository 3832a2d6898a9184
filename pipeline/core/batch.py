"""The data sets of a batch, one at a time."""

from __future__ import annotations

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch


def batch_of(batch: Batch, name: str = "") -> Batch:
    """The samples of one data set under plain names: "target_image" of the data set "target" is "image".

    "id" and "epoch" are that data set's own, so that random numbers drawn for its samples belong to them.

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
    return {field.removeprefix(f"{name}_"): value for field, value in batch.items() if field.startswith(f"{name}_")}
