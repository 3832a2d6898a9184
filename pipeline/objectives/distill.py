"""Distillation: a student follows one or several frozen teachers, by any sum of losses, with labels or without.

Hinton et al., "Distilling the Knowledge in a Neural Network" (2015, arXiv 1503.02531), and what came after it: the
losses are in :mod:`pipeline.nn.distillation`, each with its source. Teacher and student see the same crop, augmented
and mixed alike (Beyer et al., "Knowledge distillation: A good teacher is patient and consistent", CVPR 2022), each
under its own normalisation. Shape letters: B samples, L losses, L' of them means over samples, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.strict import Positive
from pipeline.core.errors import ConfigError
from pipeline.core.protocols import (
    Batch,
    Clock,
    DataFacts,
    Embeddings,
    Origin,
    PairwiseObjective,
    Picture,
    StepContext,
    StepOutput,
)
from pipeline.dist.collectives import all_gather, all_reduce, rank_and_world, wide
from pipeline.nn.batch_norm import frozen_statistics
from pipeline.nn.construct import construct_encoder
from pipeline.nn.distillation import contrast
from pipeline.nn.distillation.kinds import Kind, Loss, OfBlock, Queue
from pipeline.nn.dropout import dropping_for
from pipeline.nn.encoder import EncoderConfig, ImageClassifier
from pipeline.nn.images import tile
from pipeline.nn.labels import check_labels
from pipeline.nn.mixing import Mixing, mix
from pipeline.nn.randaugment import RandAugment, rand_augment
from pipeline.nn.start import start_as_big_vision
from pipeline.nn.teacher import Seen, StoresOutputs, TeacherConfig, see
from pipeline.nn.teachers import Teachers

SHOWN = 8
"""Samples in the showcase."""
KEPT = 0.99
"""Of the usual size of a loss, at each update."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]


class Config(EncoderConfig, StoresOutputs):
    """Settings of distillation; ``encoder`` and the like are the student's."""

    teachers: Annotated[dict[Name, TeacherConfig], Field(min_length=1)]
    losses: Annotated[dict[Name, Kind], Field(min_length=1)]
    """Summed with their weights."""
    balance: bool = False
    """Divide each loss by its usual size so far, so that weights compare losses of different units."""
    classes: Positive | None = None
    """That the teachers answer with; left out: those of the data."""
    augment: RandAugment | None = None
    """RandAugment, for images of three channels; left out: none."""
    mixing: Mixing = Mixing()
    """Mixup, CutMix and random erasing."""
    head_std: Annotated[float, Field(gt=0)] = 0.01
    """Of the classifier's initial weights, a truncated normal distribution."""

    @model_validator(mode="after")
    def _fit(self) -> Config:
        for name, teacher in self.teachers.items():
            if hasattr(Teachers, name):
                raise ValueError(f"a teacher cannot be called {name!r}; choose another name")
            if len(teacher.mean) != len(self.mean) or len(teacher.std) != len(self.std):
                raise ValueError(f"teachers.{name}: 'mean' and 'std' need {len(self.mean)} channels, as the student's")
        for name, loss in self.losses.items():
            self._fits(name, loss)
        if idle := sorted(self.teachers.keys() - {self.teacher_of(loss) for loss in self.losses.values()}):
            raise ValueError(f"no loss asks the teacher {idle[0]!r}; remove it, or name it in a loss")
        if any(teacher.stored for teacher in self.teachers.values()) and (self.augment or self.mixing.active):
            raise ValueError(
                "stored outputs are of crops as they are; leave out 'augment' and 'mixing', or 'stored' of the teachers"
            )
        if self.augment is not None and len(self.mean) != 3:
            raise ValueError(f"'augment' is for images of three channels, not {len(self.mean)}")
        return self

    def _fits(self, name: str, loss: Loss) -> None:
        if hasattr(nn.ModuleDict, name):
            raise ValueError(f"a loss cannot be called {name!r}; choose another name")
        if loss.reads == "labels" and loss.teacher:
            raise ValueError(f"losses.{name}: labels ask no teacher; remove 'teacher'")
        if loss.teacher and loss.teacher not in self.teachers:
            raise ValueError(f"losses.{name}: no teacher is called {loss.teacher!r}; there are {sorted(self.teachers)}")
        if loss.reads != "labels" and not loss.teacher and len(self.teachers) > 1:
            raise ValueError(f"losses.{name}: which teacher? Set 'teacher' to one of {sorted(self.teachers)}")
        if isinstance(loss, OfBlock):
            if loss.reads == "map" and loss.block is None:
                raise ValueError(f"losses.{name}: set 'block', the name of a block of the student")
            if loss.block is None and loss.teacher_block is not None:
                raise ValueError(f"losses.{name}: 'teacher_block' without 'block'; set both, or neither")
            teacher = self.teachers[loss.teacher or next(iter(self.teachers))]
            if loss.block is not None and teacher.stored:
                raise ValueError(
                    f"losses.{name}: reads a block, which is not stored; leave out 'stored' of its teacher"
                )
            if loss.block is not None and (self.checkpointing or self.compile or teacher.compile):
                raise ValueError(
                    f"losses.{name}: blocks cannot be read under 'checkpointing' or 'compile'; set them to false"
                )
        if loss.labelled and loss.reads == "logits" and self.mixing.active:
            raise ValueError(f"losses.{name}: this kind needs one label for each image, which mixing leaves none with")

    def teacher_of(self, loss: Loss) -> str | None:
        """Name of the teacher that a loss asks; None: none."""
        return None if loss.reads == "labels" else loss.teacher or next(iter(self.teachers))


class Distill(PairwiseObjective):
    """Student, its classifier where a loss reads logits, teachers, and the layers that losses put between them.

    Losses that are means over samples are computed sample by sample where the sample is; those that compare samples
    get what they compare, and compare it once, over the global batch.
    """

    usual: Tensor
    seen: Tensor

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        self.config, self.names = config, facts.classes
        self.compares = config.balance or any(loss.compares for loss in config.losses.values())
        labelled = any(loss.labelled for loss in config.losses.values())
        self.needs = {"image": f"uint8[B,{len(config.mean)},H,W]"} | ({"label": "int64[B]"} if labelled else {})
        self.encoder = construct_encoder(config, facts.image_size, "distill", start=start_as_big_vision)
        answering = {config.teacher_of(loss) for loss in config.losses.values() if loss.reads in ("labels", "logits")}
        classes = _classes(config, facts, labelled) if answering else 0
        self.head = nn.Linear(self.encoder.dim, classes) if classes else None
        if self.head is not None:
            nn.init.trunc_normal_(self.head.weight, std=config.head_std)
            nn.init.zeros_(self.head.bias)
        self.teachers = Teachers(
            config.teachers, facts, {name: classes if name in answering else 0 for name in config.teachers}
        )
        self.needs = {**self.needs, **self.teachers.needs}
        self.connectors = self._connectors(facts.image_size)
        for name, loss in config.losses.items():
            if isinstance(loss, Queue):
                width = self.teachers.named(config.teacher_of(loss) or "").dim
                self.register_buffer(f"queue_{name}", functional.normalize(torch.randn(loss.size, width), dim=1))
                self.register_buffer(f"filled_{name}", torch.zeros(1, dtype=torch.int64))
        if config.balance:
            self.register_buffer("usual", torch.ones(len(config.losses)))
            self.register_buffer("seen", torch.zeros(1, dtype=torch.int64))
        self._fresh: dict[str, Tensor] = {}
        self._labels_checked = False

    def _blocks(self, teacher: str | None) -> list[str]:
        """Names of the blocks that losses read of a teacher, or of the student (None)."""
        found = [
            (loss.blocks[0] if teacher is None else loss.blocks[1])
            for loss in self.config.losses.values()
            if isinstance(loss, OfBlock) and loss.blocks and teacher in (None, self.config.teacher_of(loss))
        ]
        return sorted(set(found))

    @torch.no_grad()
    def _connectors(self, image_size: tuple[int, int]) -> nn.ModuleDict:
        """The layers of each loss, as wide as what models give of an empty image."""
        empty = torch.zeros(1, len(self.config.mean), *image_size)
        found = nn.ModuleDict()
        asked = {teacher: self._blocks(teacher) for teacher in (None, *self.config.teachers)}
        training, shapes = self.encoder.training, dict[str | None, dict[str, tuple[int, ...]]]()
        self.encoder.eval()
        for teacher, blocks in asked.items():
            what = "objective" if teacher is None else f"objective.teachers.{teacher}"
            try:
                if blocks:
                    model = self.teachers[teacher] if teacher else partial(see, self.encoder, None)
                    shapes[teacher] = {name: tuple(x.shape) for name, x in model(empty, blocks=blocks).blocks.items()}
            except ConfigError as error:
                raise ConfigError(f"{what}: {error}") from error
        self.encoder.train(training)
        for name, loss in self.config.losses.items():
            if loss.reads in ("labels", "logits"):
                continue
            widths = self.encoder.dim, self.teachers.named(self.config.teacher_of(loss) or "").dim
            if isinstance(loss, OfBlock) and loss.blocks:
                teacher = self.config.teacher_of(loss)
                widths = shapes[None][loss.blocks[0]][1], shapes[teacher][loss.blocks[1]][1]
            try:
                layers = loss.connectors(*widths)
            except ValueError as error:
                raise ConfigError(f"objective.losses.{name}: {error}") from error
            if layers:
                found[name] = nn.ModuleDict(layers)
        return found

    def seen_by_student(self, batch: Batch, ctx: StepContext) -> tuple[Tensor, Tensor, Tensor | None]:
        """The images as they are trained on.

        Returns:
            Normalised for the student, float32[B,C,H,W]; the same from 0 to 1, for teachers; labels, int64[B], or
            parts of classes, float32[B,K], where images are mixed.
        """
        config, normalize, image = self.config, self.encoder.normalize, batch["image"]
        label = batch["label"] if "label" in self.needs else None
        if config.augment is not None:
            fill = normalize.mean.flatten() * 255
            image = rand_augment(image, ctx.random(batch, "distill.augment"), config.augment, fill)
        x = normalize(image)
        if not config.mixing.active:
            return x, image.float() / 255, label
        x, partner, part = mix(x, ctx.random(batch, "distill.mix"), config.mixing)
        if label is not None and self.head is not None:
            own = functional.one_hot(label, self.head.out_features).to(part)
            label = part[:, None] * own + (1 - part[:, None]) * own[partner]
        return x, x * normalize.std + normalize.mean, label

    def embed(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """ "each", float[B,L'], of losses that are means over samples; what others compare; hits; "features"."""
        if "label" in self.needs and not self._labels_checked:  # once: it waits for the device
            check_labels(batch["label"], self.names)
            self._labels_checked = True
        x, pixels, label = self.seen_by_student(batch, ctx)
        with dropping_for(batch, ctx):
            student = see(self.encoder, self.head, x, self._blocks(None))
        taught = self.teachers.ask(batch, pixels, {name: self._blocks(name) for name in self.config.teachers})
        rows, each = dict[str, Tensor](), list[Tensor]()
        for name, loss in self.config.losses.items():
            mine, its = self._read(name, loss, student, taught)
            if loss.compares:
                assert its is not None
                rows[f"{name}.student"], rows[f"{name}.teacher"] = wide(mine), wide(its)
            else:
                each.append(loss.losses(mine, its, label))
        if each:
            rows["each"] = torch.stack(each, dim=1)
        rows["features"] = student.features.detach()
        return rows | self._hits(student, taught, batch)

    def taught(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """Pooled features, "features", and "logits" of the teachers that have a classifier."""
        seen = self.teachers.ask(batch, batch["image"].float() / 255, dict.fromkeys(self.config.teachers, ()))
        return {
            name: {key: value for key, value in (("features", x.features), ("logits", x.logits)) if value is not None}
            for name, x in seen.items()
        }

    def _read(self, name: str, loss: Loss, student: Seen, taught: Mapping[str, Seen]) -> tuple[Tensor, Tensor | None]:
        """What a loss is given of student and teacher, behind its layers."""
        if loss.reads == "labels":
            assert student.logits is not None
            return student.logits, None
        teacher = taught[self.config.teacher_of(loss) or ""]
        if loss.reads == "logits":
            assert student.logits is not None
            return student.logits, teacher.logits
        given = {"student": student.features, "teacher": teacher.features}
        if isinstance(loss, OfBlock) and loss.blocks:
            given = {"student": student.blocks[loss.blocks[0]], "teacher": teacher.blocks[loss.blocks[1]]}
        if name in self.connectors:
            layers = self.connectors[name]
            assert isinstance(layers, nn.ModuleDict)
            for side, layer in layers.items():
                given[side] = layer(given[side].movedim(1, -1)).movedim(-1, 1)
        return given["student"], given["teacher"]

    @torch.no_grad()
    def _hits(self, student: Seen, taught: Mapping[str, Seen], batch: Batch) -> dict[str, Tensor]:
        """Whether the student answers as the label says ("top1"), and as each teacher does, float32[B]."""
        if student.logits is None:
            return {}
        best = student.logits.argmax(dim=1)
        hits = {"top1": batch["label"] == best} if "label" in self.needs else {}
        for name, seen in taught.items():
            if seen.logits is not None:
                hits[f"agreement_{name}"] = seen.logits.argmax(dim=1) == best
        return {f"metric.{name}": hit.float() for name, hit in hits.items()}

    def loss(self, embeddings: Embeddings, ctx: StepContext) -> StepOutput:
        """The weighted sum; each loss by its name, before weights, and how often the student answers like others."""
        rows, found, place = embeddings.rows, dict[str, Tensor](), 0
        for name, loss in self.config.losses.items():
            if not loss.compares:
                found[name] = rows["each"][:, place]
                place += 1
                continue
            mine, its = rows[f"{name}.student"], rows[f"{name}.teacher"]
            if isinstance(loss, Queue):
                queue: Tensor = getattr(self, f"queue_{name}")
                found[name] = contrast.against_queue(mine, its, queue, loss.temperature)
                self._fresh[name] = functional.normalize(its.detach(), dim=1)
            else:
                found[name] = loss.losses(mine, its, None)
        parts = torch.stack(list(found.values()), dim=1)
        weights = [loss.weight_at(ctx.clock.progress) for loss in self.config.losses.values()]
        losses = (parts * (parts.new_tensor(weights) / self._usual(parts.detach()))).sum(dim=1)
        metrics = {f"loss_{name}": value.detach().mean() for name, value in found.items()}
        metrics |= {k.removeprefix("metric."): v.mean() for k, v in rows.items() if k.startswith("metric.")}
        return StepOutput(losses.mean(), metrics, losses.detach(), rows["features"])

    def _usual(self, parts: Tensor) -> Tensor:
        """The usual size of each loss, float[L], the same on all ranks; ones where losses are not balanced."""
        if not self.config.balance:
            return parts.new_ones(parts.shape[1])
        now = all_reduce(parts.mean(dim=0)) / rank_and_world()[1]
        self._fresh["usual"] = now
        return torch.where(self.seen > 0, self.usual.to(now), now).clamp_min(torch.finfo(now.dtype).tiny)

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        """Note how large losses were, and put the teacher's features of the step in place of the oldest."""
        for name, fresh in self._fresh.items():
            if name == "usual":
                kept = torch.where(self.seen > 0, KEPT * self.usual + (1 - KEPT) * fresh, fresh)
                self.usual.copy_(kept)
                self.seen.add_(1)
                continue
            queue, filled = getattr(self, f"queue_{name}"), getattr(self, f"filled_{name}")
            keys = all_gather(fresh)[-len(queue) :].to(queue.dtype)
            places = (filled + torch.arange(len(keys), device=keys.device)) % len(queue)
            queue[places] = keys
            filled.copy_((filled + len(keys)) % len(queue))
        self._fresh = {}

    def frozen(self) -> Mapping[str, Origin]:
        """The teachers."""
        origins = self.teachers.origins(() if self.config.classes else self.names)
        return {f"teachers.{name}": origin for name, origin in origins.items()}

    def encoders(self) -> dict[str, nn.Module]:
        """The student with its own pooling; "logits" is its classifier, where it has one."""
        if self.head is None:
            return {"image": self.encoder}
        return {"image": self.encoder, "logits": ImageClassifier(self.encoder, nn.Identity(), self.head)}

    def no_weight_decay(self) -> set[str]:
        """What timm names for the backbone: positions and class token."""
        return self.encoder.no_weight_decay("encoder.")

    def layers(self) -> Sequence[Sequence[str]]:
        """The student's stem and blocks, as timm groups them; all that stands behind it comes after the last."""
        return self.encoder.layers("encoder.")

    def inputs(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """The crop, and what augmentation and mixing make of it."""
        if self.config.augment is None and not self.config.mixing.active:
            return {"image": batch["image"]}
        return {"image": batch["image"], "seen": self.encoder.normalize.invert(self.seen_by_student(batch, ctx)[0])}

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """A row of images, and what each costs the student."""
        batch = {name: value[:SHOWN] for name, value in batch.items()}
        fresh, image = self._fresh, self.inputs(batch, ctx)
        with frozen_statistics(self):
            output = self.loss(Embeddings(self.embed(batch, ctx), {}), ctx)
        self._fresh = fresh
        assert output.losses is not None
        lost = ", ".join(f"{value:.3g}" for value in output.losses.tolist())
        return {"lost": Picture(tile(list(image.values())), f"The student loses, from left to right: {lost}")}


def _classes(config: Config, facts: DataFacts, labelled: bool) -> int:
    """How many classes student and teachers answer with.

    Raises:
        ConfigError: the data and the settings do not agree, or neither says.
    """
    known = len(facts.classes)
    count = config.classes or known
    if labelled and (known < 2 or count != known):
        raise ConfigError(
            f"objective 'distill' with labels needs the data's classes; the data has {known}, and objective.classes is "
            f"{config.classes}; build the data from a source with labels, leave objective.classes out, or leave out "
            "losses with labels"
        )
    if count < 2:
        raise ConfigError(
            "objective 'distill' compares answers, and the data has no classes; set objective.classes to the number of "
            "classes of the teachers, or take losses on features"
        )
    return count
