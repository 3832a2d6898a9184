"""Teachers: frozen image models from files, with their own normalisation and resolution.

Shape letters: B samples, C channels, H, W height and width, D width of pooled features, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Annotated, Any, NamedTuple, Protocol, Self, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.strict import Positive, Strict, Text
from pipeline.core.classes import class_name, unnamed
from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch
from pipeline.nn.encoder import EncoderConfig, ImageEncoder, create_backbone
from pipeline.nn.images import IMAGENET_MEAN, IMAGENET_STD, Normalize
from pipeline.nn.reading import outputs_of
from pipeline.nn.weights import FACTS, NORMAL, TIMM, as_timm, fill_encoder, heads_of, read

WHOLE = "encoder.backbone."
"""Beginning of the encoder's names in a whole objective, whose classifier is called "head"."""


class TeacherConfig(Strict):
    """A timm model and its file."""

    weights: Text
    """What `sluice export` wrote (encoder.safetensors, or objective.safetensors, which has the classifier), or weights
    in timm's layout: safetensors, or a file of tensors alone."""
    sha256: str | None = None
    """That the file must have; left out: whatever it has when the run begins, and the same ever after."""
    encoder: Text
    """Name of a timm model."""
    encoder_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of ``timm.create_model``."""
    mean: Annotated[tuple[float, ...], Field(min_length=1)] = IMAGENET_MEAN
    """Of each channel, as it was trained, for values from 0 to 1."""
    std: Annotated[tuple[float, ...], Field(min_length=1)] = IMAGENET_STD
    image_size: Positive | tuple[Positive, Positive] | None = None
    """To which the student's crop is scaled for it: one side, or height and width; left out: as the student sees it."""
    compile: bool = False
    """Compile it with torch.compile."""
    stored: Text | None = None
    """The field that has its outputs, of the kind "stored" (``[data.field.NAME]``); left out: they are computed."""

    def size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the images that it is given, where the student's are ``image_size``."""
        if self.image_size is None:
            return image_size
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    def described(self, image_size: tuple[int, int]) -> dict[str, Any]:
        """What decides its outputs beside its file, as plain JSON values; ``image_size`` is the student's."""
        plain = self.model_dump(mode="json", include={"encoder", "encoder_args", "mean", "std"})
        return plain | {"image_size": list(self.size(image_size))}


class Seen(NamedTuple):
    """What a model makes of images."""

    features: Tensor
    """Pooled, [B,D]."""
    logits: Tensor | None
    """[B,K]; None: it has no classifier."""
    blocks: dict[str, Tensor]
    """[B,C,H,W] of the blocks that were asked for, by name."""


def see(encoder: ImageEncoder, head: nn.Module | None, x: Tensor, blocks: Collection[str]) -> Seen:
    """What an encoder and its classifier make of normalised images, float32[B,C,H,W]."""
    with outputs_of(encoder.backbone, blocks) as found:
        features = encoder.features(x)
    return Seen(features, None if head is None else head(features), found)


class Teacher(nn.Module):
    """A frozen model; random until :meth:`fill`.

    Args:
        config: model and file.
        image_size: height and width of the student's images.
        classes: of its classifier; 0: none is wanted.

    Raises:
        ConfigError: timm cannot build it so.
    """

    def __init__(self, config: TeacherConfig, image_size: tuple[int, int], classes: int) -> None:
        super().__init__()
        self.config, self.image_size = config, config.size(image_size)
        own = {name: getattr(config, name) for name in ("encoder", "encoder_args", "mean", "std", "compile")}
        backbone = create_backbone(EncoderConfig(**own), self.image_size)
        self.encoder = ImageEncoder(Normalize(config.mean, config.std), backbone, "native")
        self.head = nn.Linear(self.encoder.dim, classes) if classes else None
        self.eval().requires_grad_(False)

    @property
    def dim(self) -> int:
        """D."""
        return self.encoder.dim

    @torch.no_grad()
    def forward(self, pixels: Tensor, blocks: Collection[str]) -> Seen:
        """float32[B,C,H,W] from 0 to 1, the student's crop."""
        pixels = at_size(pixels, self.image_size)
        return see(self.encoder, self.head, self.encoder.normalize(pixels), blocks)

    def fill(self, path: str, classes: tuple[str, ...]) -> None:
        """Fill it from its file.

        Args:
            path: of the file.
            classes: names of the data's classes, in the order of the labels; empty: there are none.

        Raises:
            ConfigError: of another model, another normalisation, or other classes.
            CheckpointError: damaged.
        """
        state, metadata = read(path)
        backbone, whole = self.encoder.backbone, any(name.startswith(WHOLE) for name in state)
        self._check(path, metadata, classes)
        heads = ("head.",) if whole else heads_of(backbone)
        if self.head is not None:
            self._fill_head(path, state, heads, whole)
        trunk = {name: value for name, value in state.items() if not name.startswith(heads)}
        if whole:
            trunk = {name.removeprefix(WHOLE): value for name, value in trunk.items() if name.startswith(WHOLE)}
        trunk, wanted = as_timm(backbone, trunk), backbone.state_dict()
        missing, strange = sorted(wanted.keys() - trunk.keys()), sorted(trunk.keys() - wanted.keys())
        if missing or strange:
            made = f"; it says that it is {metadata[TIMM]}" if TIMM in metadata else ""
            raise ConfigError(
                f"{path} is not of {self.config.encoder!r} with these encoder_args: {len(missing)} tensors are missing "
                f"{missing[:3]}, {len(strange)} are not expected {strange[:3]}{made}"
            )
        fill_encoder(backbone, trunk, metadata, path)

    def _check(self, path: str, metadata: dict[str, str], classes: tuple[str, ...]) -> None:
        """Hold what a file says of itself against what was configured."""
        config = self.config
        normal: dict[str, Any] = json.loads(metadata.get(NORMAL, "{}"))
        if FACTS in metadata:
            settings = json.loads(metadata["config"])["objective"]
            normal = {name: settings[name] for name in ("mean", "std") if name in settings}
            theirs = tuple(json.loads(metadata[FACTS])["classes"])
            if self.head is not None and classes and theirs:
                _hold_classes(path, theirs, classes)
        for name, value in normal.items():
            if tuple(value) != getattr(config, name):
                raise ConfigError(
                    f"{path} was trained with {name} = {list(value)}, and is to be used with "
                    f"{list(getattr(config, name))}; set the teacher's {name}"
                )

    def _fill_head(self, path: str, state: dict[str, Tensor], heads: tuple[str, ...], whole: bool) -> None:
        assert self.head is not None
        if len(heads) != 1:
            raise ConfigError(
                f"{self.config.encoder!r} has {len(heads)} classifiers; a teacher whose logits count has one"
            )
        if whole and any(name.startswith("norm.") for name in state):
            raise ConfigError(
                f"{path} is of a linear probe, whose classifier stands behind a norm; take losses on features, or a "
                "teacher that was trained as a whole"
            )
        weight, bias = state.get(f"{heads[0]}weight"), state.get(f"{heads[0]}bias")
        if weight is None or bias is None:
            raise ConfigError(
                f"{path} holds no classifier {heads[0][:-1]!r}, and a loss reads this teacher's logits; name a file "
                "that has it (objective.safetensors of an export), or take losses on features"
            )
        weight = weight.flatten(1)  # of a convolution of one pixel
        if weight.shape != self.head.weight.shape:
            raise ConfigError(
                f"{path}: the classifier is {tuple(weight.shape)} there, and {tuple(self.head.weight.shape)} (classes, "
                "width) is wanted: teacher and student must answer with the same classes"
            )
        self.head.load_state_dict({"weight": weight, "bias": bias})


def at_size(pixels: Tensor, image_size: tuple[int, int]) -> Tensor:
    """The student's crop, float32[B,C,H,W], scaled to a teacher's height and width where these are others."""
    if tuple(pixels.shape[-2:]) == image_size:
        return pixels
    return functional.interpolate(pixels, image_size, mode="bilinear", antialias=True)


class Described(Protocol):
    """Settings of a teacher whose outputs may be stored."""

    @property
    def sha256(self) -> str | None:
        """That its file must have."""
        ...

    @property
    def stored(self) -> str | None:
        """The field that has its outputs."""
        ...

    def described(self, image_size: tuple[int, int]) -> dict[str, Any]:
        """What decides its outputs beside its file."""
        ...


class StoresOutputs:
    """What settings of an objective have whose teachers' outputs may be stored: beside a pydantic model."""

    teachers: dict[str, Any]

    def stored(self) -> dict[str, str]:
        """Teachers whose outputs are stored, to the fields that have them."""
        return {name: teacher.stored for name, teacher in self.teachers.items() if teacher.stored}

    def live(self) -> Self:
        """The same with teachers that compute their outputs."""
        live = {name: teacher.model_copy(update={"stored": None}) for name, teacher in self.teachers.items()}
        return cast("Any", self).model_copy(update={"teachers": live})


class StoredOutputs(nn.Module):
    """A teacher whose outputs come with the batch: it has no weights, and its file need not be there.

    Args:
        config: as it was when the outputs were stored.
        image_size: height and width of the student's images.
        facts: what the stored outputs say of themselves, by the field's name.

    Raises:
        ConfigError: there are none, or they are of another teacher.
    """

    def __init__(self, config: Described, image_size: tuple[int, int], facts: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        self.field = field = config.stored or ""
        if field not in facts:
            there = ", ".join(facts) or "none"
            raise ConfigError(
                f"there is no field of stored outputs {field!r} (there: {there}); add it to data.fields, with "
                f'[data.field.{field}] name = "stored"'
            )
        self.widths: Mapping[str, int] = facts[field]["outputs"]
        self.told: Mapping[str, Any] = facts[field]["teacher"]
        for name, value in config.described(image_size).items():
            if self.told.get(name) != value:
                raise ConfigError(
                    f"the stored outputs {field!r} are of a teacher with {name} = {self.told.get(name)!r}, not "
                    f"{value!r}; set it to that, or embed again"
                )
        if config.sha256 not in (None, self.told["sha256"]):
            raise ConfigError(
                f"the stored outputs {field!r} are of {self.told['path']} with sha256 {self.told['sha256']}, the "
                f"configuration says {config.sha256}; embed again"
            )

    @property
    def needs(self) -> dict[str, str]:
        """Fields of the batch."""
        return {f"{self.field}_{name}": f"float32[B,{width}]" for name, width in self.widths.items()}

    def read(self, batch: Batch) -> dict[str, Tensor]:
        """What the batch holds of it, [B,D] each."""
        return {name: batch[f"{self.field}_{name}"] for name in self.widths}


class StoredTeacher(StoredOutputs):
    """An image model by its stored outputs.

    Args:
        config: see :class:`StoredOutputs`, as the others.
        image_size: likewise.
        classes: that its logits are of; 0: none are wanted.
        facts: likewise.

    Raises:
        ConfigError: there are none, or they are of another teacher, or not the ones that are wanted.
    """

    def __init__(
        self, config: TeacherConfig, image_size: tuple[int, int], classes: int, facts: Mapping[str, Mapping[str, Any]]
    ) -> None:
        super().__init__(config, image_size, facts)
        if classes and self.widths.get("logits") != classes:
            raise ConfigError(
                f"the stored outputs {self.field!r} hold logits of {self.widths.get('logits', 0)} classes, and "
                f"{classes} are wanted; embed again with this configuration"
            )

    @property
    def dim(self) -> int:
        """D."""
        return self.widths["features"]

    def forward(self, batch: Batch) -> Seen:
        """What the batch holds of it."""
        found = self.read(batch)
        return Seen(found["features"], found.get("logits"), {})


def _hold_classes(path: str, theirs: tuple[str, ...], ours: tuple[str, ...]) -> None:
    """By name and order; classes that are only numbered are known by their count."""
    if len(theirs) != len(ours):
        raise ConfigError(f"{path} knows {len(theirs)} classes, and the data has {len(ours)}; they must be the same")
    if unnamed(theirs) or unnamed(ours):
        return
    for place, (its, own) in enumerate(zip(theirs, ours, strict=True)):
        if class_name(its) != class_name(own):
            raise ConfigError(
                f"{path} was trained on other classes: number {place} is {its!r} there, {own!r} in the data"
            )
