"""Dense labels: ``mask``, uint8[B,H,W] or int32, cropped and mirrored by the numbers of the image, never interpolated.

Views are those of the image: ``mask2`` belongs to ``image2``. A pixel takes the value of the nearest stored one.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image as PillowImage
from torch import Tensor

from pipeline.config.schema import Strict
from pipeline.config.schema import Text as Word
from pipeline.core.errors import ConfigError
from pipeline.core.image import check_pixels
from pipeline.data.decode import Geometry, ImageDecoder, Pixels, nearest
from pipeline.data.field import Arrays, Column, Field, FieldSource, Sample, Unusable

_NAMES = ("mask.png", "mask", "seg.png", "segmentation.png", "label.png")
_FORMATS = ("PNG", "TIFF", "BMP", "GIF")
"""Of files that keep each value; a JPEG does not."""
_DTYPES = {8: np.dtype(np.uint8), 16: np.dtype(np.int32)}


class Config(Strict):
    """Which member, and how large its values are."""

    member: Word | None = None
    """An image of values: grey, black and white, or the numbers of a palette. Left out: the first there is of mask.png,
    mask, seg.png, segmentation.png and label.png."""
    bits: Literal[8, 16] = 8
    """8: values up to 255, uint8 in the batch; 16: up to 65,535, int32."""


class Mask(Field):
    """A class for each pixel.

    Raises:
        ConfigError: the data set has no such member.
    """

    def __init__(self, config: Config, source: FieldSource) -> None:
        super().__init__()
        there = [name for name in _NAMES if name in source.manifest.fields]
        if config.member is None and not there:
            known = ", ".join(source.manifest.fields)
            raise ConfigError(
                f"{source.where}.member: {source.manifest.root} has none of {', '.join(_NAMES)}, only {known}; name one"
            )
        self._member = source.has(config.member or there[0], f"{source.where}.member")
        self._beside_image = "image" in source.data.fields
        self._dtype = _DTYPES[config.bits]
        self._decoder = ImageDecoder(source.data.image, source.seed)
        self.needs = (self._member,)
        self.columns = {
            name: Column(self._dtype.name, shape) for name, shape in self._decoder.shapes(source.name).items()
        }

    def draw(self, epoch: Tensor, sample: Tensor) -> Sequence[list[Geometry]]:
        """See :meth:`Field.draw`: the numbers of the image, since they have its purpose."""
        return self._decoder.geometry(epoch, sample)

    def decode(self, sample: Sample, drawn: Sequence[Geometry], arrays: Arrays, row: int) -> None:
        """See :meth:`Field.decode`."""
        try:
            mask = Pixels(torch.from_numpy(read_mask(sample.members[self._member], self._dtype))[None])
        except ValueError as error:
            raise Unusable(self._member, str(error)) from error
        size = sample.image("image").size if self._beside_image else mask.size
        if mask.size != size:
            (h, w), (height, width) = mask.size, size
            raise Unusable(self._member, f"a mask of {w} x {h} pixels for an image of {width} x {height}")
        for name, view in zip(self.columns, self._decoder.views(mask, drawn, nearest), strict=True):
            torch.from_numpy(arrays[name][row]).copy_(view[0])


def read_mask(data: memoryview, dtype: np.dtype) -> np.ndarray:
    """The values of an image of values, [h,w]: those of a palette are its numbers, not its colours.

    Raises:
        ValueError: not such an image, or a value that ``dtype`` does not hold.
    """
    try:
        with PillowImage.open(io.BytesIO(data), formats=_FORMATS) as image:
            check_pixels(image.width, image.height)
            mode, values = image.mode, np.asarray(image)
    except PillowImage.UnidentifiedImageError as error:
        raise ValueError(f"not a readable mask (none of {', '.join(_FORMATS)})") from error
    except Exception as error:  # each format's library fails in its own way
        raise ValueError(f"not a readable mask ({error})") from error
    if values.ndim != 2 or values.dtype.kind not in "biu":
        raise ValueError(f"a mask in colours (mode {mode}); its values must be grey, or the numbers of a palette")
    most = 65_535 if dtype.itemsize > 1 else 255
    if values.size and (int(values.max()) > most or int(values.min()) < 0):
        raise ValueError(f"a mask with the value {int(values.max())}; 8 bits hold 255 and 16 bits 65,535: set bits")
    return np.ascontiguousarray(values.astype(dtype))
