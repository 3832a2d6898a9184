"""Mean teacher: a classifier answers as the moving average of its own weights does, on another view of the image.

Tarvainen and Valpola, "Mean teachers are better role models: Weight-averaged consistency targets improve
semi-supervised deep learning results" (NeurIPS 2017), https://arxiv.org/abs/1703.01780. Consistency is the squared
difference of the answers, mean over classes, on unlabelled images; its weight rises as exp(-5 (1 - t)^2). What is
evaluated and exported is the teacher. Shape letters: B labelled samples, r unlabelled ones for each, K classes.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.core.protocols import Average, Batch, Clock, DataFacts, StepContext, StepOutput
from pipeline.nn.classifier import ClassifierConfig
from pipeline.nn.dropout import dropping_for
from pipeline.nn.encoder import ImageClassifier
from pipeline.nn.few_labels import FewLabels, sigmoid_ramp, spread


class Config(ClassifierConfig):
    """Settings of the mean teacher; the defaults are its PyTorch code's."""

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """What the teacher keeps of itself in each update n; at first 1 - 1/(n + 1), so that it forgets how it began."""
    consistency: Annotated[float, Field(ge=0)] = 100.0
    """Final weight of the consistency."""
    ramp: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Part of the run after which it is reached."""


class MeanTeacher(FewLabels):
    """Student and teacher; the teacher's batch norm takes the statistics of what it sees itself."""

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__(config, facts, "mean_teacher", views=2)
        self.config = config
        parts = {name: copy.deepcopy(module) for name, module in self._students()}
        self.teacher = nn.ModuleDict(parts).requires_grad_(False)

    def _students(self) -> Iterator[tuple[str, nn.Module]]:
        """What the teacher follows."""
        yield from (("encoder", self.encoder), ("norm", self.norm), ("head", self.head))

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """ "agreement" is how often student and teacher name the same class of an unlabelled image."""
        known, other = self.both(batch)
        (labelled, student), features = self.together([(known, known["image"]), (other, other["image"])], ctx)
        taught, top1 = self.supervised(labelled, known["label"])
        teacher = self.taught(known, other, ctx)
        apart = (student.softmax(dim=1) - teacher.softmax(dim=1)).square().mean(dim=1)
        weight = self.config.consistency * sigmoid_ramp(ctx.clock.progress, self.config.ramp)
        losses = taught + weight * spread(apart, len(taught))
        metrics = {
            "top1": top1,
            "loss_labelled": taught.detach().mean(),
            "loss_unlabelled": apart.detach().mean(),
            "agreement": (student.detach().argmax(dim=1) == teacher.argmax(dim=1)).float().mean(),
            "weight": torch.full_like(top1, weight),
        }
        return StepOutput(losses.mean(), metrics, losses.detach(), features)

    @torch.no_grad()
    def taught(self, known: Batch, other: Batch, ctx: StepContext) -> Tensor:
        """The teacher's logits of the other view of the unlabelled images, float32[rB,K], in the company of labelled
        ones, as the student sees them.
        """
        samples = {name: torch.cat([known[name], other[name]]) for name in ("id", "epoch")}
        with dropping_for(samples, ctx, "dropout.teacher"):
            features = self.teacher["norm"](self.teacher["encoder"](torch.cat([known["image"], other["image2"]])))
            return self.teacher["head"](features).float()[len(known["id"]) :]

    def averages(self, clock: Clock) -> Iterable[Average]:
        """The teacher."""
        keep = min(1 - 1 / (clock.step + 1), self.config.decay)
        for name, module in self._students():
            for target, source in zip(self.teacher[name].parameters(), module.parameters(), strict=True):
                yield Average(target, source, keep)

    def encoders(self) -> dict[str, nn.Module]:
        """The teacher."""
        encoder, head = self.teacher["encoder"], self.teacher["head"]
        return {"image": encoder, "logits": ImageClassifier(encoder, self.teacher["norm"], head)}  # pyright: ignore[reportArgumentType]
