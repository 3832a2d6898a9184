"""ADDA: an encoder of its own for the target, trained until a critic takes its features for the source's.

Tzeng et al., "Adversarial Discriminative Domain Adaptation" (CVPR 2017, arXiv 1702.05464). The first stage is a run of
its own on the source, `supervised`, say; its export fills the source's encoder, which stays as it is, the classifier,
and the target's encoder, which begins there. Each step then moves the critic and, with inverted labels, the target's
encoder. Shape letters: B samples.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import softplus

from pipeline.config.strict import Text
from pipeline.core.batch import batch_of
from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, DataFacts, Objective, Origin, Picture, StepContext, StepOutput
from pipeline.nn.adaptation.adversary import CriticConfig, critic
from pipeline.nn.batch_norm import frozen_statistics
from pipeline.nn.classifier import SHOWN
from pipeline.nn.construct import construct_encoder
from pipeline.nn.dropout import dropping_for
from pipeline.nn.encoder import EncoderConfig, ImageClassifier, to_weights
from pipeline.nn.images import tile
from pipeline.nn.start import start_as_big_vision
from pipeline.nn.teacher import Teacher, TeacherConfig

ENCODER = ("encoder", "encoder_args", "mean", "std")
"""What source and target encoder have in common."""


class Config(EncoderConfig):
    """Settings of ADDA; the encoder is that of the first stage."""

    source: Text
    """objective.safetensors of an export of the first stage, whose classifier is called "head"."""
    sha256: str | None = None
    """That the file must have; left out: whatever it has when the run begins, and the same ever after."""
    target: Annotated[str, Field(min_length=1)] = "target"
    """The data set ``[data.beside.NAME]`` that is adapted to."""
    critic: CriticConfig = CriticConfig(hidden=(500, 500))


class AdaptADDA(Objective):
    """Two phases: the critic tells source and target apart, and the target's encoder has it say the opposite."""

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        if len(facts.classes) < 2:
            raise ConfigError(
                f"objective 'adapt_adda' needs the classes of the first stage, data.train has {len(facts.classes)}; "
                "name the source that it was trained on"
            )
        if config.target not in facts.beside:
            there = ", ".join(facts.beside) or "none"
            raise ConfigError(
                f"objective 'adapt_adda' adapts to the data set {config.target!r} beside the first (there: {there}); "
                f"add [data.beside.{config.target}], or name another in objective.target"
            )
        spec = f"uint8[B,{len(config.mean)},H,W]"
        self.needs = {"image": spec, f"{config.target}_image": spec}
        self.config, self.classes = config, facts.classes
        own = {name: getattr(config, name) for name in ENCODER}
        self.source = Teacher(TeacherConfig(weights=config.source, **own), facts.image_size, len(facts.classes))
        self.encoder = construct_encoder(config, facts.image_size, "adapt_adda", start=start_as_big_vision)
        assert self.source.head is not None
        self.head = copy.deepcopy(self.source.head)
        self.critic = critic(self.encoder.dim, 1, config.critic)

    def phases(self) -> Mapping[str, Sequence[str]]:
        """The critic first."""
        return {"critic": ["critic."], "target": ["encoder."]}

    def frozen(self) -> Mapping[str, Origin]:
        """The source's encoder."""
        return {"source": Origin(self.config.source, self.config.sha256, self._fill)}

    def _fill(self, path: str) -> None:
        """The source's encoder and classifier, and what begins as they are; a checkpoint replaces the latter."""
        self.source.fill(path, self.classes)
        assert self.source.head is not None
        self.encoder.backbone.load_state_dict(self.source.encoder.backbone.state_dict())
        self.head.load_state_dict(self.source.head.state_dict())

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """The critic's cross-entropy, source 1 and target 0; in the phase of the target, that of target as 1."""
        target = batch_of(batch, self.config.target)
        if ctx.phase == "target":
            features = self.features(target, ctx)
            says = self.judged(features)
            losses = softplus(-says)
            fooled = {"fooled": (says > 0).float().mean()}
            return StepOutput(losses.mean(), fooled, losses.detach(), features.detach())
        pixels = batch_of(batch)["image"].float() / 255
        with torch.no_grad(), frozen_statistics(self.encoder):
            features = self.features(target, ctx)
        of_source, of_target = self.judged(self.source(pixels, ()).features), self.judged(features)
        losses = (softplus(-of_source) + softplus(of_target)) / 2
        right = ((of_source > 0).float() + (of_target <= 0).float()) / 2
        return StepOutput(losses.mean(), {"critic_accuracy": right.mean()}, losses.detach(), features)

    def features(self, batch: Batch, ctx: StepContext) -> Tensor:
        """Of the target's encoder, float[B,D]."""
        with dropping_for(batch, ctx):
            return self.encoder(batch["image"])

    def judged(self, features: Tensor) -> Tensor:
        """What the critic says, float32[B]: positive for the source."""
        return self.critic(to_weights(features, self.critic)).float().flatten()

    def encoders(self) -> dict[str, nn.Module]:
        """The target's encoder; "logits" is the first stage's classifier on it."""
        return {"image": self.encoder, "logits": ImageClassifier(self.encoder, nn.Identity(), self.head)}

    def no_weight_decay(self) -> set[str]:
        """What timm names for the backbone: positions and class token."""
        return self.encoder.no_weight_decay("encoder.")

    def layers(self) -> Sequence[Sequence[str]]:
        """Stem and blocks of the target's encoder, as timm groups them; the critic comes after the last."""
        return self.encoder.layers("encoder.")

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """A row of targets, and what they are taken for."""
        few = {name: value[:SHOWN] for name, value in batch_of(batch, self.config.target).items()}
        with frozen_statistics(self):
            guesses = self.head(self.features(few, ctx)).argmax(dim=1).tolist()
        said = ", ".join(self.classes[guess] for guess in guesses)
        return {"target": Picture(tile([few["image"]]), f"From left to right taken for: {said}")}
