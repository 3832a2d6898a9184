"""Adaptation at test time, which needs a trained classifier and unlabelled images alone: AdaBN and TENT.

- "adabn": statistics of batch norm are those of the target (Li et al., "Revisiting Batch Normalization For Practical
  Domain Adaptation", 2016, arXiv 1603.04779).
- "tent": then scales and shifts of batch norm are trained to make answers sure (Wang et al., "Tent: Fully Test-Time
  Adaptation by Entropy Minimization", ICLR 2021, arXiv 2006.10726).

The paper's TENT answers each batch while it adapts to it, by the statistics of that batch. Here it adapts to one stream
and answers another, by the statistics of the whole first one: so answers do not depend on the company of an image, and
both may be the same stream. The run that is measured stays as it is. Shape letters: B samples of a batch.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from pipeline.config.durations import Duration
from pipeline.config.schema import Component, Image, Optimizer, Strict, Training
from pipeline.core.evaluation import EvalContext, Evaluation, Features, Output, Uses
from pipeline.evals._classes import in_classes_of
from pipeline.evals._classified import accuracies, guesses
from pipeline.evals._test_time import Tent, norms_of, recalibrated
from pipeline.evals._training import settled

TRAINING = Training(
    length=Duration(1, "ep"),
    global_batch=64,
    micro_batch=64,
    optimizer=Optimizer(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0),
    schedule=Component(name="constant"),
    fields=("image",),
)


class Config(Strict):
    """Settings of adaptation at test time."""

    adapt: str = "target"
    """Stream that is adapted to; its labels are not read."""
    test: str = "test"
    """Stream that is classified."""
    methods: Annotated[tuple[Literal["adabn", "tent"], ...], Field(min_length=1)] = ("adabn", "tent")
    training: Training = TRAINING
    """Of TENT: one pass, by Adam at a rate of 1e-3, as in the paper. If ``image`` is left out, centre crops of the size
    of the suite's images; a micro-batch holds no more than a rank's share of ``global_batch``."""


class TestTime(Evaluation):
    """Reports "test_time/top1_source", as the model is, and "test_time/top1_adabn" and "test_time/top1_tent"; with at
    least five classes "top5" too.
    """

    __test__ = False
    """Its name is not that of a test."""
    trains = True

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """Labels of what is classified alone."""
        streams = {self.config.adapt: ("image",)}
        return Uses(streams | {self.config.test: ("image", "label")}, ("logits",))

    def check(self, ctx: EvalContext) -> None:
        """A model with batch norm."""
        norms_of(ctx.encoders["logits"])

    def run(self, ctx: EvalContext) -> Iterator[Output]:
        """Adapt and classify on all ranks.

        Raises:
            ConfigError: batch norms without scale and shift.
            DataError: a sample is of a class that the classifier was not trained on.
            Mistakes: the batch does not fit the data or the ranks.
            NonFiniteError: the loss is not finite.
        """
        config, classifier = self.config, ctx.encoders["logits"]
        known = ctx.classes["logits"]
        source = ctx.features("logits", config.test)
        label = in_classes_of(source, known, config.test, "the classifier").label
        found = {"source": source}
        if "adabn" in config.methods:
            found["adabn"] = self._classified(ctx, "adabn", classifier)
        if "tent" in config.methods:
            tent = Tent(classifier)
            training = settled(config.training, ctx, config.adapt)
            if "image" not in config.training.model_fields_set:
                size = training.image.size
                training = training.model_copy(update={"image": Image(size=size, crop="center")})
            ctx.train(tent, config.adapt, training)
            found["tent"] = self._classified(ctx, "tent", tent.encoders()["logits"])
        for name, features in found.items():
            yield from accuracies("test_time", guesses(features.x), label, len(known), config.test, f"_{name}")

    def _classified(self, ctx: EvalContext, name: str, model: nn.Module) -> Features:
        """By the statistics of the stream that is adapted to."""
        adapted = recalibrated(model, ctx.streams[self.config.adapt], ctx.place.device)
        return ctx.features(f"{name} of {ctx.folder.name}", self.config.test, module=adapted)
