"""ImageNet-C's corruptions, rendered on the fly: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations" (ICLR 2019).

The constants of their ``make_imagenet_c.py``, for images of 224 pixels. At other sizes lengths (radii, deviations,
displacements) grow with the shorter side, and what lies over an image (snow, fog, frost, drops, the moves of rubber) is
drawn at 224 pixels and resized; what belongs to pixels as such (noise, JPEG) stays. Chance belongs to the sample, so
that an image is always damaged in the same way. The published files were drawn once and are JPEGs of quality 85; these
are not stored, and their frost is drawn where ImageNet-C has photographs.
"""

from collections.abc import Callable

from torch import Tensor

from pipeline.nn.common_corruptions import blur, digital, noise, spatter, weather
from pipeline.nn.common_corruptions.draw import Draw
from pipeline.nn.common_corruptions.levels import to_levels

STANDARD: dict[str, Callable[[Tensor, int, Draw], Tensor]] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "defocus_blur": blur.defocus_blur,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "brightness": digital.brightness,
    "contrast": digital.contrast,
    "elastic_transform": digital.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": digital.jpeg_compression,
}
"""The fifteen that are reported."""
EXTRA: dict[str, Callable[[Tensor, int, Draw], Tensor]] = {
    "speckle_noise": noise.speckle_noise,
    "gaussian_blur": blur.gaussian_blur,
    "spatter": spatter.spatter,
    "saturate": digital.saturate,
}
"""The four that methods may be chosen by."""
KNOWN = STANDARD | EXTRA
SEVERITIES = (1, 2, 3, 4, 5)


def corrupted(image: Tensor, name: str, severity: int, draw: Draw) -> Tensor:
    """Damage images.

    Args:
        image: uint8[B,C,H,W]; one channel counts as three equal ones, whose brightness is given back.
        name: of :data:`KNOWN`.
        severity: 1 to 5.
        draw: chance of the B samples.

    Returns:
        uint8[B,C,H,W].
    """
    x = image.expand(-1, 3, -1, -1).float() / 255
    made = KNOWN[name](x, severity, draw).clamp(0, 1)
    return to_levels(made if image.shape[1] == 3 else weather.grey(made))
