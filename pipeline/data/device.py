"""From what loaders write to a batch on its way to the device: pinned copies, and JPEGs decoded by the GPU.

With ``data.decode = "device"`` a loader writes image files as they are stored, and the rank decodes whole batches by
torchvision's nvJPEG and crops there. Random numbers belong to the samples, so crops and flips are those of the CPU
path; pixels differ a little, since decoders differ.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.core.errors import DataError
from pipeline.core.protocols import Batch
from pipeline.data.chance import Chance
from pipeline.data.decode import ImageDecoder, Pixels, turned
from pipeline.data.jpeg import MAGIC, Jpeg

ENCODED, SIZE = "encoded", "encoded_size"
"""Columns of image files that are decoded on the device."""
MAX_BYTES = 1 << 24
"""Of an image file that is decoded on the device. Memory is taken only for what files fill."""

Receive = Callable[[dict[str, np.ndarray]], Batch]
"""Arrays of a micro-batch that will be written over, to a batch that will not."""


def check_jpeg(data: memoryview) -> np.ndarray:
    """A JPEG file as uint8[bytes], its header read.

    Raises:
        ValueError: it cannot be decoded on the device.
    """
    if bytes(data[: len(MAGIC)]) != MAGIC:
        raise ValueError('not a JPEG, which data.decode = "device" needs; set it to "loader"')
    if len(data) > MAX_BYTES:
        raise ValueError(f'a JPEG of {len(data):,} bytes; data.decode = "device" takes {MAX_BYTES:,}')
    if Jpeg(data).colours == 4:
        raise ValueError('a JPEG in CMYK; data.decode = "device" takes grey and RGB')
    return np.frombuffer(data, np.uint8)


def copied(arrays: dict[str, np.ndarray]) -> Batch:
    """A batch in the host's memory."""
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


def pinned(arrays: dict[str, np.ndarray]) -> Batch:
    """A batch in pinned memory, from which copies to a GPU run beside the computation."""
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {n: torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t) for n, t in batch.items()}


class Encoded(NamedTuple):
    """The images of one data set of a batch."""

    decoder: ImageDecoder
    base: int
    """Id in the batch of the data set's sample 0."""
    chance: Chance = Chance(0)


def decode_jpegs(files: list[Tensor], device: torch.device) -> list[Tensor]:
    """JPEG files, uint8[bytes] each on the host, to uint8[3,h,w] each on the device.

    Raises:
        RuntimeError: one of them cannot be decoded.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    with warnings.catch_warnings():
        # Since 0.29 torchvision announces that this will move to another package, without saying when.
        warnings.simplefilter("ignore", DeprecationWarning)
        return list(decode_jpeg(files, mode=ImageReadMode.RGB, device=device))


class DeviceImages:
    """Decodes the images of batches on a device.

    Args:
        sources: prefix of a data set's columns to its images.
        device: where.
    """

    def __init__(self, sources: Mapping[str, Encoded], device: torch.device) -> None:
        self._sources = sources
        self._device = device
        self._receive = pinned if device.type == "cuda" else copied
        # Beside the computation, which uses another stream.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, arrays: dict[str, np.ndarray]) -> Batch:
        """See :data:`Receive`.

        Raises:
            DataError: an image cannot be decoded.
        """
        files = {prefix + name for prefix in self._sources for name in (ENCODED, SIZE)}
        batch = self._receive({name: array for name, array in arrays.items() if name not in files})
        if self._stream is None:
            return batch | self._images(arrays)
        with torch.cuda.stream(self._stream):
            images = self._images(arrays)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for image in images.values():
            image.record_stream(current)
        return batch | images

    def _images(self, arrays: dict[str, np.ndarray]) -> Batch:
        """All views of all images: uint8[B,3,H,W]."""
        images: Batch = {}
        for prefix, (decoder, base, chance) in self._sources.items():
            epoch, ids = (torch.from_numpy(arrays[prefix + name].copy()) for name in ("epoch", "id"))
            sizes = arrays[prefix + SIZE].tolist()
            files = [torch.from_numpy(row[:n]) for row, n in zip(arrays[prefix + ENCODED], sizes, strict=True)]
            geometry = decoder.geometry(*chance.of(epoch, ids - base))
            views = [
                decoder.views(turned(Pixels(pixels), file.numpy().data), own)
                for file, pixels, own in zip(files, self._decode(files, ids), geometry, strict=True)
            ]
            for name, view in zip(decoder.names, zip(*views, strict=True), strict=True):
                images[prefix + name] = torch.stack(view)
        return images

    def _decode(self, files: list[Tensor], ids: Tensor) -> list[Tensor]:
        """uint8[3,h,w] each."""
        try:
            return decode_jpegs(files, self._device)
        except RuntimeError as error:
            for file, number in zip(files, ids.tolist(), strict=True):
                try:
                    decode_jpegs([file], self._device)
                except RuntimeError as own:
                    raise DataError(
                        f"sample number {number}: its JPEG cannot be decoded on the device ({own}); "
                        'set data.decode = "loader", which replaces such samples'
                    ) from error
            raise
