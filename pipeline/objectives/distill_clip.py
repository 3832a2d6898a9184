"""Distillation of CLIP: small towers learn how strongly large ones find images and texts of a batch to belong together.

Wu et al., "TinyCLIP: CLIP Distillation via Affinity Mimicking and Weight Inheritance" (ICCV 2023); with several
teachers and stored outputs, Vasu et al., "MobileCLIP: Fast Image-Text Models through Multi-Modal Reinforced Training"
(CVPR 2024), whose synthetic captions are the data's matter. Weights are inherited by ``[start]``, which gives a student
of fewer layers the teacher's first ones. Shape letters: B samples, E common width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import (
    Batch,
    DataFacts,
    Embeddings,
    Export,
    Origin,
    PairwiseObjective,
    Picture,
    StepContext,
    StepOutput,
)
from pipeline.nn.clip import LARGEST_SCALE, ImageTower, TowersConfig
from pipeline.nn.clip_pictures import SHOWN, nearest_pictures
from pipeline.nn.clip_teacher import ClipTeacher, ClipTeacherConfig, StoredClip
from pipeline.nn.construct import construct_encoder
from pipeline.nn.contrastive import info_nce
from pipeline.nn.distillation.affinity import affinity
from pipeline.nn.dropout import dropping_for
from pipeline.nn.open_clip import open_clip_files
from pipeline.nn.start import start_as_clip
from pipeline.nn.teacher import StoresOutputs

Weight = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]


class Config(TowersConfig, StoresOutputs):
    """Settings of the distillation; those of towers are the student's."""

    teachers: Annotated[dict[Name, ClipTeacherConfig], Field(min_length=1)]  # pyright: ignore
    """Of several the mean of their answers is followed, after the softmax, as MobileCLIP has it."""
    affinity: Weight = 1.0
    """Weight of what the teachers say."""
    contrast: Weight = 0.0
    """Weight of CLIP's own loss, which pairs of the data belong together."""
    first_scale: Annotated[float, Field(gt=0, le=LARGEST_SCALE)] = 1 / 0.07
    """The student's inverse temperature at the beginning; it is trained, and at most 100."""

    @model_validator(mode="after")
    def _fit(self) -> Config:
        if self.affinity == self.contrast == 0:
            raise ValueError("'affinity' and 'contrast' are both 0: nothing is learnt")
        for name, teacher in self.teachers.items():
            if hasattr(nn.ModuleDict, name):
                raise ValueError(f"a teacher cannot be called {name!r}; choose another name")
            for setting in ("vocab", "length", "end"):
                if (its := getattr(teacher, setting)) != (own := getattr(self, setting)):
                    raise ValueError(
                        f"teachers.{name}: {setting} = {its}, and the student's is {own}; both read the same tokens"
                    )
        return self


class DistillClip(PairwiseObjective):
    """Two towers and a temperature, and the teachers."""

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        self.config, self.image_size = config, facts.image_size
        encoder = construct_encoder(config, facts.image_size, "distill_clip", start=start_as_clip)
        self.image = ImageTower(encoder, config.dim)
        self.text = config.text_encoder()
        # One dimension: not decayed, and some engines cannot send a number without any.
        self.log_scale = nn.Parameter(torch.tensor([math.log(config.first_scale)]))
        self.teachers, self.needs = nn.ModuleDict(), config.needs
        for name, teacher in config.teachers.items():
            self.teachers[name] = made = self._teacher(name, teacher, facts)
            if isinstance(made, StoredClip):
                self.needs = {**self.needs, **made.needs}
        self._tokens_checked = False

    def _teacher(self, name: str, config: ClipTeacherConfig, facts: DataFacts) -> ClipTeacher | StoredClip:
        try:
            if config.stored is not None:
                return StoredClip(config, facts.image_size, facts.stored)
            with torch.random.fork_rng(devices=[]):  # the student's weights are the same with stored outputs
                return ClipTeacher(config, facts.image_size)
        except ConfigError as error:
            raise ConfigError(f"objective.teachers.{name}: {error}") from error

    def embed(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """Unit vectors float32[B,E] of images and texts: the student's, and each teacher's as "NAME.image"."""
        if not self._tokens_checked:  # once: it waits for the device
            self.config.check_tokens(batch["text"], batch["text_length"])
            self._tokens_checked = True
        with dropping_for(batch, ctx):
            image, text = self.image(batch["image"]), self.text(batch["text"], batch["text_length"])
        rows = {name: functional.normalize(x.float(), dim=1) for name, x in (("image", image), ("text", text))}
        taught = {name: teacher(batch) for name, teacher in self.teachers.items()}
        return rows | {f"{name}.{side}": x for name, sides in taught.items() for side, x in sides.items()}

    def taught(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """Unit vectors, "image" and "text", of each teacher."""
        return {name: teacher(batch) for name, teacher in self.teachers.items()}

    def shared(self) -> dict[str, Tensor]:
        """Inverse temperature."""
        return {"scale": self.log_scale.float().exp()}

    def loss(self, embeddings: Embeddings, ctx: StepContext) -> StepOutput:
        """The weighted sum; "agreement" is the mean cosine of true pairs, "scale" the student's inverse temperature."""
        rows, scale, config = embeddings.rows, embeddings.shared["scale"], self.config
        image, text = rows["image"], rows["text"]
        follows = torch.stack(
            [
                affinity(image, text, scale, rows[f"{name}.image"], rows[f"{name}.text"], teacher.scale)
                for name, teacher in config.teachers.items()
            ]
        ).mean(dim=0)
        losses = config.affinity * follows
        metrics = {
            "loss_affinity": follows.detach().mean(),
            "scale": scale.detach().squeeze(0),
            "agreement": (image * text).detach().sum(dim=1).mean(),
        }
        if config.contrast:
            finds = info_nce(image, text, scale, reduction="none")
            losses = losses + config.contrast * finds
            metrics["loss_contrast"] = finds.detach().mean()
        return StepOutput(losses.mean(), metrics, losses.detach(), image.detach())

    def frozen(self) -> Mapping[str, Origin]:
        """The teachers."""
        found: dict[str, Origin] = {}
        for name, config in self.config.teachers.items():
            teacher = self.teachers[name]
            if isinstance(teacher, StoredClip):
                found[f"teachers.{name}"] = Origin(config.weights, teacher.told["sha256"], stored=True)
            else:
                found[f"teachers.{name}"] = Origin(config.weights, config.sha256, partial(self._fill, name))
        return found

    def _fill(self, name: str, path: str) -> None:
        teacher = self.teachers[name]
        assert isinstance(teacher, ClipTeacher)
        teacher.fill(path)

    def limits(self) -> Mapping[str, tuple[float, float]]:
        """The inverse temperature stays between 1 and 100, as CLIP's."""
        return {"log_scale": (0.0, math.log(LARGEST_SCALE))}

    def no_weight_decay(self) -> set[str]:
        """The class token and registers, as CLIP's."""
        ends = ("cls_token", "reg_token")
        return {f"image.encoder.{name}" for name, _ in self.image.encoder.named_parameters() if name.endswith(ends)}

    def encoders(self) -> dict[str, nn.Module]:
        """Both towers: "text" maps int64[B,L] and int64[B] to float[B,E]."""
        return {"image": self.image, "text": self.text}

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """The captions nearest to each image, and the images nearest to each caption, among those shown."""
        batch = {name: value[:SHOWN] for name, value in batch.items()}
        rows = self.embed(batch, ctx)
        return nearest_pictures(batch, rows["image"] @ rows["text"].T, ctx)

    def exports(self) -> dict[str, Export]:
        """The student for open_clip."""
        return open_clip_files(self.config, self.image, self.text, self.image_size, self.log_scale.squeeze(0))
