"""Zero-shot classification: the class whose name, put into sentences, is nearest to the image.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (ICML 2021), section 3.1, in
open_clip's protocol: unit vectors of all sentences of a class are averaged and normalised again.
Shape letters: N images, C classes, S sentences per class, E width.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional

from pipeline.config.schema import Strict
from pipeline.core.evaluation import EvalContext, Evaluation, Number, Table, Uses

TEXTS = 256
"""Sentences encoded at once."""


class Config(Strict):
    """Settings of zero-shot classification."""

    test: str = "val"
    """Stream that is classified; its classes' names are read."""
    templates: Annotated[tuple[str, ...], Field(min_length=1)] = ("a photo of a {}.",)
    """Sentences, with {} for the name of the class."""

    @field_validator("templates")
    @classmethod
    def _have_a_place(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if "{}" not in template:
                raise ValueError(f"{template!r} has no {{}} for the name of the class")
        return templates


class ZeroShot(Evaluation):
    """Reports "zero_shot/top1", with at least five classes "zero_shot/top5", and "zero_shot/mean_class_recall".

    The table "zero_shot/classes" has the recall of each class that occurs.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """Both towers; the classes are known by the stream's names."""
        return Uses({self.config.test: ("image", "label")}, ("image", "text"))

    def scores(self, classes: int) -> Mapping[str, tuple[float, float]]:
        """The share of a class."""
        return {f"zero_shot/top{k}": (k / classes, 1.0) for k in (1, 5) if k <= classes}

    def run(self, ctx: EvalContext) -> Iterator[Number | Table]:
        """Encode class names on every rank, images shared out, and count."""
        split = self.config.test
        features = ctx.features("image", split)
        names = self.class_vectors(ctx, features.classes)
        scores = functional.normalize(features.x, dim=1) @ names.T
        best = scores.topk(min(5, len(names)), dim=1).indices == features.label[:, None]
        n = len(features.x)
        for name, k in (("top1", 1), ("top5", 5)):
            if k <= len(names):
                p = int(best[:, :k].sum()) / n
                yield Number(f"zero_shot/{name}", p, n, split, math.sqrt(p * (1 - p) / n))
        right = torch.bincount(features.label, best[:, 0].double(), len(names)).tolist()
        counts = torch.bincount(features.label, minlength=len(names)).tolist()
        rows = [(c, n, r / n) for c, n, r in zip(features.classes, counts, right, strict=True) if n]
        yield Number("zero_shot/mean_class_recall", sum(recall for *_, recall in rows) / len(rows), n, split)
        yield Table("zero_shot/classes", ("class", "images", "recall"), rows, split)

    def class_vectors(self, ctx: EvalContext, classes: Sequence[str]) -> Tensor:
        """One unit vector per class, float32[C,E]."""
        templates = self.config.templates
        texts = [t.replace("{}", name) for name in classes for t in templates]
        parts = []
        for first in range(0, len(texts), TEXTS):
            tokens = ctx.tokens(texts[first : first + TEXTS])
            z = ctx.encoders["text"](*(tokens[name].to(ctx.place.device) for name in ("text", "text_length")))
            parts.append(functional.normalize(z.float(), dim=1).cpu())
        means = torch.cat(parts).view(len(classes), len(templates), -1).mean(dim=1)
        return functional.normalize(means, dim=1)
