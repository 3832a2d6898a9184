"""Classification accuracy score: how well a classifier trained on made images does on real ones.

Ravuri and Vinyals, "Classification Accuracy Score for Conditional Generative Models" (NeurIPS 2019): what a model of
images leaves out, of a class or of its variety, a classifier cannot learn from it. Beside it stands the same classifier
trained alike on as many real images. Classifiers are trained, so that on other numbers of ranks the last digits differ.
Shape letters: B samples.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from pipeline.config.durations import Duration
from pipeline.config.schema import Component, Optimizer, Training
from pipeline.core import registry
from pipeline.core.components import OBJECTIVES, check_component
from pipeline.core.errors import ConfigError
from pipeline.core.evaluation import EvalContext, Number, Output, Uses
from pipeline.core.manifest import load
from pipeline.core.protocols import DataFacts, Objective
from pipeline.dist.group import by_first, gather_objects
from pipeline.evals._classes import renumbered
from pipeline.evals._classified import accuracies, classified, guesses
from pipeline.evals._samples import OfSamples, SamplesConfig, check_told_classes, chosen, in_order
from pipeline.evals._written import write

TRAINING = Training(
    length=Duration(90, "ep"),
    optimizer=Optimizer(name="sgd", lr=0.1, momentum=0.9, lr_scaling="linear", lr_batch=256, weight_decay=1e-4),
    schedule=Component.model_validate({"name": "cosine", "warmup": "5%"}),
)


class Config(SamplesConfig):
    """Settings of the classification accuracy score."""

    train: str = "train"
    """Stream of the real images that the other classifier is trained on."""
    test: str = "val"
    """Stream of real images that both are measured on, in the geometry of the suite."""
    baseline: bool = True
    """Train on as many real images too, drawn from the stream, as they come in the geometry of the suite."""
    classifier: Component = Component.model_validate({"name": "supervised", "encoder": "resnet50"})
    """An objective that offers "logits", with its settings."""
    training: Training = TRAINING
    """Of both. If ``image`` is left out, random crops of the size of the images; a micro-batch holds no more than a
    rank's share of ``global_batch``."""


class ClassificationAccuracy(OfSamples):
    """Reports "classification_accuracy/top1", with at least five classes "top5", the mean over classes and the table of
    confusions, of the classifier trained on made images; "top1_real" and "top5_real" of the other one; and "gap", how
    much better that is in top-1.
    """

    trains = True
    config: Config  # pyright: ignore[reportIncompatibleVariableOverride]

    def uses(self) -> Uses:
        """Real images with their labels."""
        streams, encoders, _ = super().uses()
        names = (self.config.train, self.config.test) if self.config.baseline else (self.config.test,)
        return Uses({**streams, **{n: ("image", "label", *streams.get(n, ())) for n in names}}, encoders)

    def check(self, ctx: EvalContext) -> None:
        """As many real images as made ones, and a classifier."""
        super().check(ctx)
        own = self.config
        check_told_classes(ctx, "classification_accuracy")
        self._classifier(DataFacts(own.training.image.shape, ctx.classes["generator"], own.samples))
        if own.baseline and (found := ctx.streams[own.train].samples) < own.samples:
            raise ConfigError(
                f"classification_accuracy.samples = {own.samples}: stream {own.train!r} has {found} real images to "
                "compare with; make as many, or set baseline = false"
            )

    def run(self, ctx: EvalContext) -> Iterator[Output]:
        """Make, write, train and classify on all ranks.

        Raises:
            ConfigError: the classifier has no logits.
            DataError: images cannot be written, or a test sample is of a class that the model is not told.
            Mistakes: the batch does not fit the data or the ranks.
            NonFiniteError: a sample or the loss is not finite.
        """
        known, test = ctx.classes["generator"], self.config.test
        made = ((part.id, part.image, cast("Tensor", part.label)) for part in self.made(ctx))
        guess, label = self._trained(ctx, made, "made")
        yield from classified("classification_accuracy", guess, label, known, test)
        if self.config.baseline:
            other, _ = self._trained(ctx, self._real(ctx), "real")
            for number in accuracies("classification_accuracy", other, label, len(known), test, "_real"):
                yield number._replace(better=None)
            gap = (other[:, 0] == label).float() - (guess[:, 0] == label).float()
            error = float(gap.std(correction=0)) / len(gap) ** 0.5
            yield Number("classification_accuracy/gap", float(gap.mean()), len(gap), test, error, "lower", gap.numpy())

    def _real(self, ctx: EvalContext) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This rank's real images, with labels as the model numbers classes."""
        stream, known = ctx.streams[self.config.train], ctx.classes["generator"]
        for batch in stream:
            mine = chosen(batch["id"], stream.samples, self.config.samples)
            if mine.any():
                label = batch["label"][mine]
                label = renumbered(label, stream.classes, known, f"stream {self.config.train!r}", "the model")
                yield batch["id"][mine], batch["image"][mine], label

    def _trained(
        self, ctx: EvalContext, parts: Iterable[tuple[Tensor, Tensor, Tensor]], what: str
    ) -> tuple[Tensor, Tensor]:
        """Train on images and classify the test stream: guesses int64[N,5] and labels int64[N], in its order."""
        folder, sizes = ctx.folder / what, list[tuple[int, int]]()
        data = write(_measured(parts, sizes), ctx.classes["generator"], folder)
        size = next(found[0] for found in gather_objects(sizes[:1]) if found)
        training = self._training(size, ctx.place.world_size)
        manifest = load(data)
        objective = self._classifier(DataFacts(training.image.shape, manifest.classes, manifest.samples))
        ctx.train(objective, data, training)
        by_first(lambda: shutil.rmtree(folder))
        return self._classify(ctx, objective.encoders()["logits"])

    def _training(self, size: tuple[int, int], world: int) -> Training:
        """With what is left out."""
        training = self.config.training
        more: dict[str, object] = {"micro_batch": min(training.micro_batch, max(1, training.global_batch // world))}
        if "image" not in training.model_fields_set:
            more["image"] = training.image.model_copy(update={"size": size})
        return training.model_copy(update=more)

    def _classifier(self, facts: DataFacts) -> Objective:
        """On every rank the same.

        Raises:
            ConfigError: it has no logits.
        """
        own = self.config.classifier
        settings = check_component(OBJECTIVES, own, "classification_accuracy", ("classifier",))
        make = cast("Callable[..., Objective]", registry.component(OBJECTIVES, own.name, Objective))
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(self.config.training.seed)
            objective = make(settings, facts)
        if "logits" not in objective.encoders():
            raise ConfigError(f"classification_accuracy.classifier: {own.name!r} offers no logits; name a classifier")
        return objective

    def _classify(self, ctx: EvalContext, classifier: nn.Module) -> tuple[Tensor, Tensor]:
        name, known = self.config.test, ctx.classes["generator"]
        rows: list[tuple[Tensor, ...]] = []
        for batch in ctx.streams[name]:
            found = guesses(classifier(batch["image"].to(ctx.place.device)).float()).cpu()
            rows.append((batch["id"], found, batch["label"]))
        _, guess, label = in_order(rows)
        return guess, renumbered(label, ctx.streams[name].classes, known, f"stream {name!r}", "the model")


def _measured(
    parts: Iterable[tuple[Tensor, Tensor, Tensor]], sizes: list[tuple[int, int]]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The same parts; heights and widths of their images are added to ``sizes``."""
    for part in parts:
        sizes.append((part[1].shape[-2], part[1].shape[-1]))
        yield part
