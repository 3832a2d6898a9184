"""Gathers what each sample lost, from the ranks that trained on it to the one that writes it down."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.core.errors import ConfigError, DataError
from pipeline.core.protocols import Batch, StepOutput
from pipeline.dist.gather import gather_ragged
from pipeline.dist.group import by_first
from pipeline.record.losses import LossFiles


class Ledger:
    """The losses of samples since they were last written.

    Args:
        files: where they go; used on rank 0 alone.
    """

    def __init__(self, files: LossFiles) -> None:
        self.files = files
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, output: StepOutput, batch: Batch) -> None:
        """Take in a micro-batch; nothing waits for the device.

        Raises:
            ConfigError: on every rank, when the objective does not tell the parts of samples.
        """
        if output.losses is None:
            raise ConfigError('record.losses: the loss of this objective has no parts of samples; set it to "never"')
        # not a number is kept as infinite: in the file it means that a sample was not seen
        self._parts.append((batch["id"], batch["epoch"], output.losses.float().nan_to_num(torch.inf, torch.inf)))

    def flush(self) -> None:
        """Write what there is; on all ranks together.

        Raises:
            DataError: on every rank: the disk takes no more.
        """
        if not self._parts:
            return
        columns = [torch.cat(column) for column in zip(*self._parts, strict=True)]
        self._parts.clear()
        ids, epochs, losses = (gather_ragged(column).cpu().numpy() for column in columns)

        def write() -> None:
            try:
                self.files.write(epochs, ids, losses)
                self.files.flush()
            except OSError as error:
                raise DataError(f"cannot write into {self.files.folder} ({error.strerror}); make room") from error

        by_first(write)
