"""Supervised classification: any timm backbone and a linear classifier, trained by cross-entropy.

The baseline beside every self-supervised method, the objective of fine-tuning (of all, of the last blocks, or kept near
its start: :mod:`pipeline.nn.nearness`), and, with the backbone frozen, the linear probe of He et al., "Masked
Autoencoders Are Scalable Vision Learners" (CVPR 2022), appendix A.1. Label smoothing is that of Szegedy et al.,
"Rethinking the Inception Architecture" (2016). Shape letters: B samples, K classes.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Annotated

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, DataFacts, Objective, Origin, Picture, StepContext, StepOutput
from pipeline.nn.batch_norm import GlobalBatchNorm
from pipeline.nn.classifier import ClassifierConfig, bottleneck, classifying_head
from pipeline.nn.construct import construct_encoder
from pipeline.nn.dropout import dropping_for
from pipeline.nn.encoder import ImageClassifier
from pipeline.nn.images import tile
from pipeline.nn.labels import check_labels
from pipeline.nn.mixing import Mixing, mix
from pipeline.nn.nearness import Nearness, Regularise, starting_point
from pipeline.nn.partial import rest, train_last
from pipeline.nn.randaugment import RandAugment, rand_augment
from pipeline.nn.start import start_as_big_vision
from pipeline.nn.weights import load_encoder

SHOWN = 8
"""Samples in the showcase."""


class Config(ClassifierConfig):
    """Settings of supervised training; drop path and the like go into ``encoder_args``."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Part of the target that is spread over all classes."""
    augment: RandAugment | None = None
    """RandAugment, for images of three channels; left out: none."""
    mixing: Mixing = Mixing()
    """Mixup, CutMix and random erasing."""
    freeze: bool = False
    """Train the classifier alone, behind a batch norm without scale and shift: a linear probe."""
    blocks: Annotated[int, Field(ge=1)] | None = None
    """Train the last blocks (stages, of a convolutional network) alone, with what comes after them; the others stay in
    eval mode. Left out: all are trained."""
    regularise: Regularise | None = None
    """Keep the encoder near ``weights``: {kind = "l2_sp"} its weights, {kind = "feature_maps"} what its blocks give."""

    @model_validator(mode="after")
    def _fit(self) -> "Config":
        if self.freeze and self.weights is None:
            raise ValueError("'freeze' without 'weights' would train a classifier on random features; set weights")
        if self.freeze and self.bottleneck is not None:
            raise ValueError("'freeze' trains the classifier alone, and 'bottleneck' is a layer before it; remove one")
        if self.augment is not None and len(self.mean) != 3:
            raise ValueError(f"'augment' is for images of three channels, not {len(self.mean)}")
        if self.freeze and (self.blocks or self.regularise):
            raise ValueError("'freeze' trains the classifier alone; remove it, or 'blocks' and 'regularise'")
        if self.regularise is not None and self.weights is None:
            raise ValueError("'regularise' keeps the encoder near its start, which is 'weights'; set weights")
        if self.regularise is not None and (self.checkpointing or self.compile):
            raise ValueError("'regularise' cannot see blocks under 'checkpointing' or 'compile'; set them to false")
        return self


class Supervised(Objective):
    """Backbone with its own pooling, then a linear classifier."""

    norm: nn.Module

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        if len(facts.classes) < 2:
            raise ConfigError(
                f"objective 'supervised' needs a data set with at least two classes, this one has "
                f"{len(facts.classes)}; build it from a source with labels"
            )
        self.needs = {"image": f"uint8[B,{len(config.mean)},H,W]", "label": "int64[B]"}
        self.config = config
        self.classes = facts.classes
        self.encoder = construct_encoder(
            config, facts.image_size, "supervised", start=start_as_big_vision, stem_of_small_images=config.small_stem
        )
        self.norm = nn.Identity()
        if config.freeze:
            self.encoder.requires_grad_(False)
            self.norm = GlobalBatchNorm(nn.BatchNorm1d(self.encoder.dim, affine=False, eps=1e-6))
        elif config.bottleneck:
            self.norm = bottleneck(self.encoder.dim, config.bottleneck)
        width = config.bottleneck or self.encoder.dim
        self.head = classifying_head(width, len(facts.classes), config.head_std, config.weight_norm)
        if config.blocks is not None:
            train_last(self, self.layers(), config.blocks)
        self._nearness: Nearness | None = None
        if config.regularise is not None:
            self.start = starting_point(config.regularise, self.encoder)
            self._nearness = Nearness(config.regularise, self.encoder, self.start, self.head)
        self._labels_checked = False

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """Cross-entropy; "top1", and "top5" where there are at least five classes, are parts of the micro-batch.

        Where samples are mixed, the loss is that of both labels by their parts, and hits are those of the first.
        """
        label = batch["label"]
        if not self._labels_checked:  # once: it waits for the device
            check_labels(label, self.classes)
            self._labels_checked = True
        image, mixing = self.augmented(batch, ctx), self.config.mixing.active
        x, partner, part = self.mixed(image, batch, ctx) if mixing else (self.encoder.normalize(image), None, None)
        watch = nullcontext(()) if self._nearness is None else self._nearness.measured(x)
        with dropping_for(batch, ctx), watch as penalties:
            features = self.encoder.features(x)
            logits = self.classify(features)
        losses = self._cross_entropy(logits, label)
        if partner is not None and part is not None:
            losses = part * losses + (1 - part) * self._cross_entropy(logits, label[partner])
        best = logits.detach().topk(min(5, len(self.classes)), dim=1).indices == label[:, None]
        metrics = {"top1": best[:, :1].any(dim=1).float().mean()}
        if len(self.classes) >= 5:
            metrics["top5"] = best.any(dim=1).float().mean()
        for penalty in penalties:
            metrics["regularisation"] = penalty.detach().mean()
            losses = losses + penalty
        return StepOutput(losses.mean(), metrics, losses.detach(), features.detach())

    def augmented(self, batch: Batch, ctx: StepContext) -> Tensor:
        """The images as they are trained on, before any are mixed: uint8[B,C,H,W]."""
        if self.config.augment is None:
            return batch["image"]
        fill = self.encoder.normalize.mean.flatten() * 255
        return rand_augment(batch["image"], ctx.random(batch, "supervised.augment"), self.config.augment, fill)

    def mixed(self, image: Tensor, batch: Batch, ctx: StepContext) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised images, each mixed with its partner; the partners, and the part of its own that each keeps."""
        x = self.encoder.normalize(image)
        return mix(x, ctx.random(batch, "supervised.mix"), self.config.mixing)

    def inputs(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """The crop, and what augmentation and mixing make of it."""
        seen, image = {"image": batch["image"]}, self.augmented(batch, ctx)
        if self.config.augment is not None:
            seen["augmented"] = image
        if self.config.mixing.active:
            seen["mixed"] = self.encoder.normalize.invert(self.mixed(image, batch, ctx)[0])
        return seen

    def _cross_entropy(self, logits: Tensor, label: Tensor) -> Tensor:
        return functional.cross_entropy(logits, label, label_smoothing=self.config.label_smoothing, reduction="none")

    def logits(self, image: Tensor) -> Tensor:
        """uint8[B,C,H,W] to float32[B,K]."""
        return self.classify(self.encoder(image))

    def classify(self, features: Tensor) -> Tensor:
        """float[B,D] to float32[B,K]."""
        return self.head(self.norm(features)).float()

    def train(self, mode: bool = True) -> "Supervised":
        """What is frozen stays in eval mode: no drop path, no change of its statistics."""
        super().train(mode)
        if self.config.freeze or self.config.blocks is not None:
            rest(self.encoder)
        return self

    def frozen(self) -> Mapping[str, Origin]:
        """Where a regularised encoder starts from."""
        if self._nearness is None or self.config.weights is None:
            return {}
        fill = partial(load_encoder, self.start.backbone, antialias=self.config.antialias)
        return {"start": Origin(self.config.weights, None, fill)}

    def encoders(self) -> dict[str, nn.Module]:
        """The backbone with its own pooling; "logits" is the classifier on it."""
        return {"image": self.encoder, "logits": ImageClassifier(self.encoder, self.norm, self.head)}

    def no_weight_decay(self) -> set[str]:
        """What timm names for the backbone: positions and class token."""
        return self.encoder.no_weight_decay("encoder.")

    def layers(self) -> Sequence[Sequence[str]]:
        """Stem and blocks, as timm groups them; the classifier and a norm after pooling come after the last."""
        return self.encoder.layers("encoder.")

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """A row of images, and under them what they are and what they are taken for."""
        batch = {name: value[:SHOWN] for name, value in batch.items()}
        image = batch["image"]
        with dropping_for(batch, ctx):
            predicted = self.logits(image).argmax(dim=1)
        pairs = zip(batch["label"].tolist(), predicted.tolist(), strict=True)
        said = ", ".join(
            self.classes[true] + ("" if true == guess else f" (taken for {self.classes[guess]})")
            for true, guess in pairs
        )
        return {"predictions": Picture(tile([image]), f"From left to right: {said}")}
