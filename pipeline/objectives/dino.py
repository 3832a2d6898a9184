"""DINO: a student's answer to any crop of an image is that of a slowly moving teacher to a large one; iBOT, too.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (ICCV 2021), arXiv 2104.14294.
With ``masked``, Zhou et al., "iBOT: Image BERT Pre-Training with Online Tokenizer" (ICLR 2022),
https://arxiv.org/abs/2111.07832: the student's large crops lack patches, whose answers are the teacher's too.
Shape letters: B samples, C channels, V crops of each, N patches, M masked ones at most, D width, E bottleneck, K
prototypes.
"""

from collections.abc import Iterable
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.config.durations import Duration
from pipeline.core.protocols import Average, Batch, Clock, DataFacts, Objective, Picture, StepContext, StepOutput
from pipeline.dist.collectives import all_reduce, rank_and_world
from pipeline.nn.attention import class_attention
from pipeline.nn.augment import Colour, augment
from pipeline.nn.dino_head import DINOHead
from pipeline.nn.dropout import dropping_for
from pipeline.nn.encoder import EncoderConfig, ImageEncoder, to_weights
from pipeline.nn.followers import cosine_to_one, follower, following
from pipeline.nn.images import tile
from pipeline.nn.masked_tokens import MaskedTokens, Masking, Masks
from pipeline.nn.multicrop import LARGE, construct_multicrop, crop_needs, crop_sizes, encode_crops
from pipeline.nn.start import start_as_dino

SHOWN = 8
"""Samples in the showcase."""
JITTER = Colour(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
Temperature = Annotated[float, Field(gt=0)]


class Masked(Masking):
    """iBOT: what is masked of the student's large crops; the defaults are its ViTs'."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """Of the loss of masked patches."""
    teacher_temperature: Temperature = 0.07
    """Of patches, after the warm-up."""
    centre_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9


class Config(EncoderConfig):
    """Settings of DINO; the defaults are the paper's ViT-S/16."""

    encoder: str = "vit_small_patch16_224"
    small_stem: bool = False
    """The stem of a ResNet for images of 32 pixels."""
    hidden: Annotated[int, Field(ge=1)] = 2048
    """Width inside the head."""
    bottleneck: Annotated[int, Field(ge=1)] = 256
    """E."""
    prototypes: Annotated[int, Field(ge=2)] = 65536
    """K."""
    fixed_lengths: bool = True
    """Prototypes keep length one, which is safer; trained lengths are somewhat better for small ViTs."""
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.996
    """What the teacher keeps of itself in the first update; it rises to 1 on half a cosine."""
    temperature: Temperature = 0.1
    """Of the student."""
    teacher_temperature_start: Temperature = 0.04
    teacher_temperature: Temperature = 0.07
    """Of the teacher: it sharpens; reached in a straight line from its start."""
    teacher_warmup: Duration = Duration(30.0, "ep")
    centre_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """What the mean of the teacher's answers, which is subtracted from them, keeps of itself in each update."""
    colour: Colour = JITTER.model_copy(update={"blur": 1.0})
    """Of the first large crop; then of the second, and of small ones."""
    colour2: Colour = JITTER.model_copy(update={"blur": 0.1, "solarize": 0.2})
    colour_small: Colour = JITTER
    masked: Masked | None = None
    """Left out: DINO."""

    @model_validator(mode="after")
    def _in_samples(self) -> "Config":
        if self.teacher_warmup.unit == "ba":
            raise ValueError("teacher_warmup: write epochs, samples or a part of the run, like '30ep', '1Msa' or '10%'")
        return self


class DINO(Objective):
    """Student and teacher; the centre is the mean over the global batch, moved once per update.

    The loss is a mean over samples, since the centre is that of the steps before.
    """

    centre: Tensor
    patch_centre: Tensor

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        sizes = crop_sizes(facts, "dino")
        self.config, self._epoch = config, facts.samples
        self.needs = crop_needs(sizes, len(config.mean))
        self.names = list(self.needs)
        # Patches are wanted, too, where some are masked. Positions are resampled for small crops: antialiased by timm,
        # not so by the authors.
        of_tokens: dict[str, Any] = {} if config.masked is None else {"pool": "cls", "global_pool": ""}
        self.encoder = construct_multicrop(
            config, sizes, "dino", start=start_as_dino, stem_of_small_images=config.small_stem, **of_tokens
        )
        self.head = DINOHead(
            self.encoder.dim,
            hidden=config.hidden,
            bottleneck=config.bottleneck,
            prototypes=config.prototypes,
            fixed_lengths=config.fixed_lengths,
        )
        self.teacher = nn.ModuleDict({"encoder": follower(self.encoder), "head": follower(self.head)})
        self.register_buffer("centre", torch.zeros(config.prototypes))
        self.tokens: MaskedTokens | None = None
        if config.masked is not None:
            self.tokens = MaskedTokens(self.encoder.backbone, config.masked, sizes[0])
            self.register_buffer("patch_centre", torch.zeros(config.prototypes))
        self._answers: dict[str, tuple[Tensor, int]] = {}
        self._step = -1

    def view(self, batch: Batch, ctx: StepContext, name: str) -> Tensor:
        """One crop of each sample, float32[B,C,h,w] from 0 to 1."""
        colours = {"image": self.config.colour, "image2": self.config.colour2}
        return augment(batch[name], batch, ctx, colours.get(name, self.config.colour_small), f"dino.{name}")

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """Cross-entropies; "entropy" is that of the teacher's answers, "loss_patches" of masked ones, unweighted."""
        if self._step != ctx.clock.step:  # of a step that was given up
            self._answers, self._step = {}, ctx.clock.step
        crops = {name: self.view(batch, ctx, name) for name in self.names}
        large = torch.cat([crops.pop(name) for name in self.names[:LARGE]])
        with torch.no_grad():
            features, patches = self._see(self._teacher, large, None)
            units = self._teacher_head.units(features)
            wanted = self._wanted("centre", units, units, ctx.clock, self.config.teacher_temperature)
        masks = None if self.tokens is None else self.tokens.draw(batch, ctx, "dino.mask", self.names[:LARGE])
        with dropping_for(batch, ctx, "dropout.image"):
            seen, mine = self._see(self.encoder, large, masks)
        small = [encode_crops(self.encoder, crops, batch, ctx)] if crops else []
        answers = self.head(torch.cat([seen, *small]))
        logs = (answers / self.config.temperature).log_softmax(dim=-1).unflatten(0, (len(self.names), -1))
        losses = across(wanted.unflatten(0, (LARGE, -1)), logs)
        metrics = {"entropy": -(wanted * wanted.clamp_min(1e-30).log()).sum(dim=-1).mean()}
        if masks is not None:
            assert patches is not None and mine is not None and self.config.masked is not None
            of_patches = self._patches(patches, mine, masks, ctx.clock)
            metrics["loss_patches"] = of_patches.detach().mean()
            losses = losses + self.config.masked.weight * of_patches
        return StepOutput(losses.mean(), metrics, losses.detach(), features.chunk(LARGE)[0])

    @property
    def _teacher(self) -> ImageEncoder:
        encoder = self.teacher["encoder"]
        assert isinstance(encoder, ImageEncoder)
        return encoder

    @property
    def _teacher_head(self) -> DINOHead:
        head = self.teacher["head"]
        assert isinstance(head, DINOHead)
        return head

    def _see(self, encoder: ImageEncoder, views: Tensor, masks: Masks | None) -> tuple[Tensor, Tensor | None]:
        """Features of views, float[R,D], and where some are masked those of patches, float[R,N,D]."""
        if self.tokens is None:
            return encoder(views), None
        with self.tokens.put(encoder.backbone, masks):
            x = encoder.backbone(to_weights(encoder.normalize(views), encoder.backbone))
        return x[:, 0], x[:, encoder.backbone.num_prefix_tokens :]

    def _wanted(self, centre: str, units: Tensor, everything: Tensor, clock: Clock, last: float) -> Tensor:
        """The teacher's centred and sharpened answers, [...,K]; and takes note of their mean for the centre.

        Args:
            centre: name of the buffer.
            units: unit vectors [...,E] that are answered.
            everything: those [...,E] whose mean is the centre; that of logits is the logit of their mean.
            clock: of the step.
            last: temperature after the warm-up.
        """
        head, flat = self._teacher_head, everything.flatten(0, -2)
        total, count = self._answers.get(centre, (0, 0))
        self._answers[centre] = (total + head.last(flat.sum(dim=0)), count + len(flat))
        start = self.config.teacher_temperature_start
        sharp = start + (last - start) * self._warm(clock)
        return ((head.last(units) - getattr(self, centre)) / sharp).softmax(dim=-1)

    def _warm(self, clock: Clock) -> float:
        """The part of the teacher's warm-up that is done."""
        duration = self.config.teacher_warmup
        unit = {"ep": self._epoch, "sa": 1, "%": clock.total_samples / 100}[duration.unit]
        return min(1.0, clock.samples / (duration.value * unit)) if duration.value * unit else 1.0

    def _patches(self, taught: Tensor, mine: Tensor, masks: Masks, clock: Clock) -> Tensor:
        """Cross-entropy of masked patches, the mean over those of a view and over views: float[B]."""
        assert self.config.masked is not None
        with torch.no_grad():
            units = self._teacher_head.units(taught)
            last = self.config.masked.teacher_temperature
            wanted = self._wanted("patch_centre", masks.gather(units), units, clock, last)
        logs = (self.head(masks.gather(mine)) / self.config.temperature).log_softmax(dim=-1)
        return (-(wanted * logs).sum(dim=-1) * masks.weights).sum(dim=1).unflatten(0, (LARGE, -1)).mean(dim=0)

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        """Move the centres towards the mean of the teacher's answers in the step, over all ranks."""
        assert self._answers, "no loss was computed since the last update"
        keep = {"centre": self.config.centre_momentum}
        if self.config.masked is not None:
            keep["patch_centre"] = self.config.masked.centre_momentum
        for name, (total, count) in self._answers.items():
            centre: Tensor = getattr(self, name)
            mean = all_reduce(total.clone()) / (count * rank_and_world()[1])
            centre.lerp_(mean.to(centre.dtype), 1 - keep[name])
        self._answers = {}

    def averages(self, clock: Clock) -> Iterable[Average]:
        """The teacher."""
        keep = cosine_to_one(self.config.momentum, clock.progress)
        for name, source in (("encoder", self.encoder), ("head", self.head)):
            yield from following(self.teacher[name], source, keep)

    def encoders(self) -> dict[str, nn.Module]:
        """The teacher's, which is the better one, and which the paper evaluates."""
        return {"image": self._teacher}

    def no_weight_decay(self) -> set[str]:
        """Nothing that is no norm and no bias: the authors' code decays positions and tokens, too."""
        return set()

    def inputs(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """The crops of the data, and what is made of them."""
        made = {f"{name}, view": (self.view(batch, ctx, name) * 255).round().to(torch.uint8) for name in self.names}
        return {name: batch[name] for name in self.names} | made

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """Crops, what is masked of them, and where the teacher looks."""
        batch = {name: value[:SHOWN] for name, value in batch.items()}
        crops = [self.view(batch, ctx, name) for name in self.names]
        size = crops[0].shape[2:]
        rows, caption = [*crops[:LARGE], *crops[LARGE : LARGE + 1]], "Two large crops"
        caption += "; the first small one" if len(crops) > LARGE else ""
        if self.tokens is not None:
            masks = self.tokens.draw(batch, ctx, "dino.mask", self.names[:1])
            seen = (~masks.hidden).float().unflatten(1, (1, *self.tokens.grid))
            rows.append(crops[0] * nn.functional.interpolate(seen, size=size))
            caption += "; what the student sees of the first"
        teacher = self._teacher
        weights = class_attention(teacher.backbone, to_weights(teacher.normalize(crops[0]), teacher.backbone))
        if weights is not None:
            patch = teacher.backbone.patch_embed.patch_size
            maps = weights.unflatten(1, (1, size[0] // patch[0], size[1] // patch[1]))
            maps = maps / maps.amax(dim=(2, 3), keepdim=True)
            rows.append(nn.functional.interpolate(maps, size=size).expand_as(crops[0]))
            caption += "; where the teacher's class token looks in the first (mean over heads)"
        shown = [nn.functional.interpolate(row, size=size) if row.shape[2:] != size else row for row in rows]
        return {"crops": Picture(tile([(row * 255).round().to(torch.uint8) for row in shown]), caption)}


def across(wanted: Tensor, logs: Tensor) -> Tensor:
    """Cross-entropy of each large crop's answer with that of every other crop, the mean over pairs: float[B].

    Args:
        wanted: probabilities of the teacher, [2,B,K].
        logs: log-probabilities of the student, [V,B,K]; the first two are of the same crops.
    """
    pairs = LARGE * (len(logs) - 1)
    return -(wanted * (logs.sum(dim=0) - logs[:LARGE])).sum(dim=(0, 2)) / pairs
