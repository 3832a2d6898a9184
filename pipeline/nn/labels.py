"""Labels, as losses take them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pipeline.core.errors import DataError


def check_labels(label: Tensor, classes: Sequence[str]) -> None:
    """Hold labels against the classes; waits for the device.

    Args:
        label: int64[B].
        classes: their names.

    Raises:
        DataError: there is no such class.
    """
    low, high = int(label.min()), int(label.max())
    if low < 0 or high >= len(classes):
        raise DataError(
            f"labels run from {low} to {high}, but the manifest names {len(classes)} classes "
            f"(0 to {len(classes) - 1}); rebuild the shards or mend the manifest's classes"
        )
