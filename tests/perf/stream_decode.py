"""One core: crop, resize and flip of photographs, against Pillow and torchvision's v1 transforms to float32.

python -m tests.perf.stream_decode
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image as PillowImage
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from pipeline.config.schema import Image
from pipeline.data.decode import ImageDecoder, random_box
from tests.perf.stream_corpus import compare, jpeg, trials

IMAGES = 60
BICUBIC = transforms.InterpolationMode.BICUBIC
NORMALIZE = transforms.Normalize((0.48, 0.46, 0.41), (0.27, 0.26, 0.28))


def main() -> None:
    """Print rates."""
    rounds = trials(__doc__)
    torch.set_num_threads(1)
    files = [memoryview(bytearray(jpeg(i))) for i in range(IMAGES)]
    print(f"{IMAGES} JPEGs, mean {sum(map(len, files)) / IMAGES / 1000:.0f} kB")
    out = torch.empty(IMAGES, 3, 224, 224, dtype=torch.uint8)
    settings = Image(size=224, scale=(0.08, 1.0))
    epoch, ids = torch.zeros(IMAGES, dtype=torch.int64), torch.arange(IMAGES)
    crop = transforms.RandomResizedCrop(224, scale=(0.08, 1.0), interpolation=BICUBIC)
    flip = transforms.RandomHorizontalFlip()
    stock = transforms.Compose([crop, flip, transforms.ToTensor(), NORMALIZE])
    newer = v2.RandomResizedCrop(224, scale=(0.08, 1.0), interpolation=BICUBIC)
    modern = v2.Compose([newer, v2.RandomHorizontalFlip()])

    def ours() -> None:
        decoder = ImageDecoder(settings, 0)
        for row, (data, views) in enumerate(zip(files, decoder.geometry(epoch, ids), strict=True)):
            out[row].copy_(decoder.decode(data, views)[0])

    def pillow() -> None:
        for data in files:
            stock(PillowImage.open(io.BytesIO(data)).convert("RGB"))

    def torchvision_uint8() -> None:
        for row, data in enumerate(files):
            out[row].copy_(modern(decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), mode=ImageReadMode.RGB)))

    compare(
        "RandomResizedCrop(224) and flip, one core",
        "images",
        IMAGES,
        {
            "Pillow + torchvision v1 to float32": pillow,
            "torchvision decode_jpeg + v2, uint8": torchvision_uint8,
            "ours, uint8": ours,
        },
        rounds,
    )
    report_pixels(files, settings)


def report_pixels(files: list[memoryview], settings: Image) -> None:
    """Print how far the pixels are from Pillow's for the same boxes."""
    decoder = ImageDecoder(settings, 0)
    epoch, ids = torch.zeros(IMAGES, dtype=torch.int64), torch.arange(IMAGES)
    differences = []
    for data, (view,) in zip(files, decoder.geometry(epoch, ids), strict=True):
        (pixels,) = decoder.decode(data, [view])
        image = PillowImage.open(io.BytesIO(data)).convert("RGB")
        box = random_box((image.height, image.width), settings, view.crop)
        around = (box.left, box.top, box.left + box.width, box.top + box.height)
        same = image.crop(around).resize((224, 224), PillowImage.Resampling.BICUBIC)
        same = same.transpose(PillowImage.Transpose.FLIP_LEFT_RIGHT) if view.mirror else same
        differences.append(np.abs(np.asarray(same).astype(int) - pixels.permute(1, 2, 0).numpy()))
    print(
        f"\npixels of the same boxes against Pillow's: mean {np.mean(differences):.4f}/255, most {np.max(differences)}"
    )


if __name__ == "__main__":
    main()
