"""JPEG files to pixels, only the window that is asked for.

libjpeg-turbo through nvImageCodec (CPU only): rows and columns outside the window are entropy-decoded but neither
transformed nor converted, and decoding stops below it. The pixels are those that Pillow gives, bit for bit.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.core.image import check_pixels, jpeg_is_whole

MAGIC = b"\xff\xd8\xff"


class Box(NamedTuple):
    """A window of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


@cache
def _codec() -> Any:
    """The library. It complains on stderr of codecs that need a GPU, from C, while it is imported."""
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        from nvidia import nvimgcodec
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
    return nvimgcodec


@cache
def _decoder() -> tuple[Any, Any]:
    """A decoder that works in the calling thread, and its settings; made once per process."""
    codec = _codec()
    backends = [codec.Backend(codec.CPU_ONLY)]
    decoder = codec.Decoder(codec.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=backends)
    # Of a window it would be the window's; decode.py turns images.
    return decoder, codec.DecodeParams(apply_exif_orientation=False)


class Jpeg:
    """A JPEG file in memory.

    Raises:
        ValueError: its header cannot be read, it has too many pixels, or no end.
    """

    def __init__(self, data: memoryview) -> None:
        try:
            self._stream = _codec().CodeStream(np.frombuffer(data, np.uint8))
            self.size = (int(self._stream.height), int(self._stream.width))
            self.colours = int(self._stream.num_channels)
        except RuntimeError as error:
            raise ValueError(f"not a readable JPEG ({error})") from error
        check_pixels(self.size[1], self.size[0])
        if not jpeg_is_whole(data):
            raise ValueError("not a readable JPEG (cut short)")

    def window(self, box: Box) -> Tensor:
        """uint8[3,h,w], the pixels of a window.

        Raises:
            ValueError: the file is cut or otherwise unreadable.
        """
        decoder, parameters = _decoder()
        region = _codec().Region(box.top, box.left, box.top + box.height, box.left + box.width)
        image = decoder.decode(self._stream.get_sub_code_stream(region=region), params=parameters)
        if image is None:
            raise ValueError("not a readable JPEG (cut short, or not a JPEG beyond its header)")
        return torch.from_numpy(np.asarray(image)).permute(2, 0, 1)
