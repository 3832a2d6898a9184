"""The image: ``image``, uint8[B,3,H,W], and its further views ``image2``, ``image3``, ...; set in ``[data.image]``.

With ``data.decode = "device"`` the file itself, ``encoded`` and ``encoded_size``: the rank decodes whole batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.config.schema import Strict
from pipeline.data.decode import Geometry, ImageDecoder
from pipeline.data.device import ENCODED, MAX_BYTES, SIZE, check_jpeg
from pipeline.data.field import Arrays, Column, Field, FieldSource, Sample


class Config(Strict):
    """Size, crops and views are those of ``[data.image]``."""


class Image(Field):
    """All views of an image, or the file that the device decodes.

    Raises:
        ConfigError: the data set has no images.
    """

    def __init__(self, config: Config, source: FieldSource) -> None:
        super().__init__()
        self.needs = (source.has("image"),)
        self._decoder = ImageDecoder(source.data.image, source.seed)
        self._is_encoded = source.data.decode == "device"
        if self._is_encoded:
            self.columns = {ENCODED: Column("uint8", (MAX_BYTES,)), SIZE: Column("int64", ())}
        else:
            self.columns = {
                name: Column("uint8", (3, *shape)) for name, shape in self._decoder.shapes(source.name).items()
            }

    def draw(self, epoch: Tensor, sample: Tensor) -> Sequence[Any]:
        """See :meth:`Field.draw`; on the device crops are drawn there."""
        return [None] * len(sample) if self._is_encoded else self._decoder.geometry(epoch, sample)

    def decode(self, sample: Sample, drawn: Sequence[Geometry], arrays: Arrays, row: int) -> None:
        """See :meth:`Field.decode`."""
        if self._is_encoded:
            file = check_jpeg(sample.members["image"])
            arrays[SIZE][row] = len(file)
            arrays[ENCODED][row, : len(file)] = file
            return
        views = self._decoder.views(sample.image("image"), drawn)
        for name, view in zip(self.columns, views, strict=True):
            torch.from_numpy(arrays[name][row]).copy_(view)
