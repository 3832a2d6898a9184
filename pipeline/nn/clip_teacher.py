"""A frozen CLIP as a teacher, from a file or by outputs that were stored.

Shape letters: B samples, C channels, H, W height and width, D common width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.strict import Positive, PositiveFloat, Text
from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch
from pipeline.nn.clip import ImageTower, TowersConfig
from pipeline.nn.encoder import ImageEncoder, create_backbone
from pipeline.nn.images import Normalize
from pipeline.nn.teacher import StoredOutputs, at_size
from pipeline.nn.weights import read

TOWERS = ("image.", "text.")
"""Beginnings of a CLIP's names in the objective that it was trained in."""


class ClipTeacherConfig(TowersConfig):
    """Towers as they were trained, and their file. It reads the student's tokens."""

    weights: Text  # pyright: ignore[reportGeneralTypeIssues]
    """``objective.safetensors`` of an export of the objective "clip"."""
    sha256: str | None = None
    """That the file must have; left out: whatever it has when the run begins, and the same ever after."""
    image_size: Positive | tuple[Positive, Positive] | None = None
    """To which the student's crop is scaled for it; left out: as the student sees it."""
    scale: PositiveFloat = 100.0
    """Inverse temperature of its similarities: what trained CLIPs end at, and MobileCLIP's; TinyCLIP takes 50."""
    stored: Text | None = None
    """The field that has its outputs, of the kind "stored" (``[data.field.NAME]``); left out: they are computed."""

    def size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the images that it is given, where the student's are ``image_size``."""
        if self.image_size is None:
            return image_size
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    def described(self, image_size: tuple[int, int]) -> dict[str, Any]:
        """What decides its outputs beside its file, as plain JSON values; ``image_size`` is the student's."""
        apart = {"weights", "sha256", "image_size", "scale", "stored", "checkpointing", "compile", "antialias"}
        return self.model_dump(mode="json", exclude=apart) | {"image_size": list(self.size(image_size))}


class ClipTeacher(nn.Module):
    """Both towers, frozen; random until :meth:`fill`.

    Args:
        config: towers and file.
        image_size: height and width of the student's images.

    Raises:
        ConfigError: timm cannot build it so.
    """

    def __init__(self, config: ClipTeacherConfig, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.image_size = config, config.size(image_size)
        backbone = create_backbone(config.model_copy(update={"weights": None}), self.image_size)
        self.image = ImageTower(ImageEncoder(Normalize(config.mean, config.std), backbone, "native"), config.dim)
        self.text = config.text_encoder()
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Unit vectors float32[B,D] of images and texts."""
        pixels = at_size(batch["image"].float() / 255, self.image_size)
        encoder = self.image.encoder
        image = self.image.projection(encoder.features(encoder.normalize(pixels)))
        text = self.text(batch["text"], batch["text_length"])
        return {name: functional.normalize(x.float(), dim=1) for name, x in (("image", image), ("text", text))}

    def fill(self, path: str) -> None:
        """Fill it from its file.

        Raises:
            ConfigError: of other towers.
            CheckpointError: damaged.
        """
        state = {name: value for name, value in read(path)[0].items() if name.startswith(TOWERS)}
        wanted = self.state_dict()
        other = sorted(n for n in state.keys() | wanted.keys() if _shape(state.get(n)) != _shape(wanted.get(n)))
        if other:
            raise ConfigError(
                f"{path} is not of these towers: {len(other)} tensors differ, first {other[0]} (there: "
                f"{_shape(state.get(other[0]))}, here: {_shape(wanted.get(other[0]))}); name objective.safetensors of "
                "an export of 'clip', and the settings that it was trained with"
            )
        self.load_state_dict(state)


def _shape(tensor: Tensor | None) -> tuple[int, ...] | str:
    return "absent" if tensor is None else tuple(tensor.shape)


class StoredClip(StoredOutputs):
    """One whose unit vectors come with the batch."""

    def __init__(
        self, config: ClipTeacherConfig, image_size: tuple[int, int], facts: Mapping[str, Mapping[str, Any]]
    ) -> None:
        super().__init__(config, image_size, facts)
        if set(self.widths) != {"image", "text"}:
            raise ConfigError(
                f"the stored outputs {self.field!r} hold {', '.join(self.widths)}, not those of a CLIP; embed again"
            )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Unit vectors float32[B,D] of images and texts, as they were before they were rounded."""
        return {name: functional.normalize(x, dim=1) for name, x in self.read(batch).items()}
