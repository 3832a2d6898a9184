"""Zero-shot classification: the class whose name, put into sentences, is nearest to the image.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (ICML 2021), section 3.1, in
open_clip's protocol: unit vectors of all sentences of a class are averaged and normalised again.
Shape letters: N images, C classes, S sentences per class, E width.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import Strict
from pipeline.core.protocols import EvalStream, Evaluation, Result
from pipeline.evals._features import extract, named_stream

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
    """Reports "zero_shot/top1", with at least five classes "zero_shot/top5", and "zero_shot/mean_class_recall"."""

    needs = ("image", "text")

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, encoders: Mapping[str, nn.Module], streams: Mapping[str, EvalStream]) -> Iterator[Result]:
        """Encode class names on every rank, images shared out, and count."""
        stream = named_stream(streams, self.config.test, "zero_shot.test")
        features = extract(encoders["image"], stream)
        names = self.class_vectors(encoders["text"], stream)
        scores = functional.normalize(features.x, dim=1) @ names.T
        best = scores.topk(min(5, len(names)), dim=1).indices == features.label[:, None]
        n = stream.samples
        for name, k in (("top1", 1), ("top5", 5)):
            if k <= len(names):
                p = int(best[:, :k].sum()) / n
                yield Result(f"zero_shot/{name}", p, n, self.config.test, math.sqrt(p * (1 - p) / n))
        right = torch.bincount(features.label, best[:, 0].float(), len(names))
        counts = torch.bincount(features.label, minlength=len(names))
        recall = (right[counts > 0] / counts[counts > 0]).mean()
        yield Result("zero_shot/mean_class_recall", float(recall), n, self.config.test)

    def class_vectors(self, encoder: nn.Module, stream: EvalStream) -> Tensor:
        """One unit vector per class, float32[C,E]."""
        templates = self.config.templates
        texts = [t.replace("{}", name) for name in stream.classes for t in templates]
        device = next(encoder.parameters()).device
        parts = []
        for first in range(0, len(texts), TEXTS):
            tokens = stream.tokens(texts[first : first + TEXTS])
            z = encoder(tokens["text"].to(device), tokens["text_length"].to(device))
            parts.append(functional.normalize(z.float(), dim=1).cpu())
        means = torch.cat(parts).view(len(stream.classes), len(templates), -1).mean(dim=1)
        return functional.normalize(means, dim=1)
