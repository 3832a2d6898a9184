"""TensorBoard: ``RUN/tensorboard``. It hides by itself what was written after the step that a run goes on from."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image

from pipeline.record.logger import Begun, Logger
from pipeline.record.pictures import Shown

PACKAGE = "tensorboard"
FOLDER = "tensorboard"


class TensorBoard(Logger):
    """Event files, a new one for each start."""

    def __init__(self, begun: Begun) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        self._board = SummaryWriter(str(begun.folder / FOLDER), purge_step=begun.step + 1)
        if begun.config:
            self._board.add_text("config", f"```toml\n{begun.config}\n```", begun.step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """As they are."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def picture(self, step: int, shown: Shown) -> None:
        """Under "showcase/"."""
        with Image.open(shown.path) as image:
            self._board.add_image(f"showcase/{shown.name}", np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        """Write out what is held."""
        self._board.close()
