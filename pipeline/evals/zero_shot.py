"""Zero-shot classification: the class whose name, put into sentences, is nearest to the image.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (ICML 2021), section 3.1, in
open_clip's protocol: unit vectors of all sentences of a class are averaged and normalised again. With several labels of
an image (``field = "labels"``) classes are ranked one by one, as CLIP_benchmark does: mean average precision.
Shape letters: N images, C classes, S sentences per class, E width.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from pydantic import Field, field_validator
from sklearn.metrics import average_precision_score
from torch import Tensor
from torch.nn import functional

from pipeline.config.schema import Strict
from pipeline.core.classes import class_name
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.evaluation import EvalContext, Evaluation, Number, Output, Table, Uses
from pipeline.evals._classified import classified, guesses

TEXTS = 256
"""Sentences encoded at once."""
Names = Annotated[tuple[str, ...], Field(min_length=1)]


class Config(Strict):
    """Settings of zero-shot classification. Files are read when the settings are, and what they say is the setting."""

    test: str = "val"
    """Stream that is classified."""
    templates: Annotated[tuple[str, ...], Field(min_length=1)] = ("a photo of a {}.",)
    """Sentences, with {} (or {c}) for the name of the class; or a file with one a line."""
    names: Mapping[str, Names] | tuple[str, ...] = ()
    """What classes are called in sentences: a name, or several that are averaged, for each class that is called
    otherwise than the data set calls it; or a list in the order of the classes; or a file: .json of either, or a name a
    line. Left out: the data set's names."""
    field: Literal["label", "labels"] = "label"
    """Of the stream's batches: one class of each image, or any number of them."""

    @field_validator("templates", mode="before")
    @classmethod
    def _from_lines(cls, given: Any) -> Any:
        return _tupled(_lines(given) if isinstance(given, str) else given)

    @field_validator("names", mode="before")
    @classmethod
    def _from_file(cls, given: Any) -> Any:
        if isinstance(given, str):
            given = json.loads(_text(given)) if given.endswith(".json") else _lines(given)
        if isinstance(given, Mapping):
            return {str(key): (own,) if isinstance(own, str) else _tupled(own) for key, own in given.items()}
        return _tupled(given)

    @field_validator("templates")
    @classmethod
    def _have_a_place(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if "{}" not in template and "{c}" not in template:
                raise ValueError(f"{template!r} has no {{}} for the name of the class")
        return templates


class ZeroShot(Evaluation):
    """Reports "zero_shot/top1", with at least five classes "zero_shot/top5", "zero_shot/mean_per_class_recall", and the
    tables "zero_shot/classes" (the recall of each class that occurs) and, with at most fifty classes,
    "zero_shot/confusion".

    Of several labels "zero_shot/mean_average_precision", over the classes that some image has, and the same table.
    """

    version = 2

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """Both towers; the classes are known by the stream's names."""
        return Uses({self.config.test: ("image", self.config.field)}, ("image", "text"))

    def scores(self, classes: int) -> Mapping[str, tuple[float, float]]:
        """The share of a class."""
        if self.config.field == "labels":
            return {}
        return {f"zero_shot/top{k}": (k / classes, 1.0) for k in (1, 5) if k <= classes}

    def check(self, ctx: EvalContext) -> None:
        """Names are of classes that there are."""
        classes, names = ctx.streams[self.config.test].classes, self.config.names
        if isinstance(names, tuple):
            if names and len(names) != len(classes):
                raise ConfigError(
                    f"zero_shot.names: {len(names)} names for the {len(classes)} classes of stream "
                    f"{self.config.test!r}; give one for each, in their order, or name classes one by one"
                )
            return
        known = set(map(class_name, classes))
        if strangers := [name for name in names if class_name(name) not in known]:
            raise ConfigError(
                f"zero_shot.names: stream {self.config.test!r} has no class {strangers[0]!r}; it has "
                f"{', '.join(map(repr, classes[:5]))}{' and more' if len(classes) > 5 else ''}"
            )

    def run(self, ctx: EvalContext) -> Iterator[Output]:
        """Encode class names on every rank, images shared out, and count.

        Raises:
            DataError: no image has any of several labels.
        """
        split = self.config.test
        found = ctx.features("image", split, (self.config.field,))
        vectors = self.class_vectors(ctx, self.called(found.classes))
        scores = functional.normalize(found.x, dim=1) @ vectors.T
        if self.config.field == "labels":
            yield from _ranked(scores, found.fields["labels"], found.classes, split)
            return
        guess, label = guesses(scores), found.label
        yield from classified("zero_shot", guess, label, found.classes, split)
        right = torch.bincount(label, guess[:, 0] == label, len(found.classes)).tolist()
        counts = torch.bincount(label, minlength=len(found.classes)).tolist()
        rows = [(c, n, r / n) for c, n, r in zip(found.classes, counts, right, strict=True) if n]
        yield Table("zero_shot/classes", ("class", "images", "recall"), rows, split)

    def called(self, classes: Sequence[str]) -> list[tuple[str, ...]]:
        """The names of each class that are put into sentences."""
        names = self.config.names
        if isinstance(names, tuple):
            return [(name,) for name in names or classes]
        by_class = {class_name(key): own for key, own in names.items()}
        return [by_class.get(class_name(name), (name,)) for name in classes]

    def class_vectors(self, ctx: EvalContext, names: Sequence[Sequence[str]]) -> Tensor:
        """One unit vector for each class, which has one name or several, float32[C,E]."""
        texts = [
            [t.replace("{c}", "{}").replace("{}", name) for name in own for t in self.config.templates] for own in names
        ]
        flat, parts = [text for own in texts for text in own], []
        for first in range(0, len(flat), TEXTS):
            tokens = ctx.tokens(flat[first : first + TEXTS])
            z = ctx.encoders["text"](*(tokens[name].to(ctx.place.device) for name in ("text", "text_length")))
            parts.append(functional.normalize(z.float(), dim=1).cpu())
        means = [own.mean(dim=0) for own in torch.cat(parts).split([len(own) for own in texts])]
        return functional.normalize(torch.stack(means), dim=1)


def _ranked(scores: Tensor, labels: Tensor, classes: Sequence[str], split: str) -> Iterator[Output]:
    """How well each class ranks the images float32[N,C], of which uint8[N,C] belong to it."""
    there = [i for i in range(len(classes)) if labels[:, i].any()]
    if not there:
        raise DataError(f"no image of stream {split!r} has any of its labels; there is nothing to rank")
    precision = {i: float(average_precision_score(labels[:, i].numpy(), scores[:, i].numpy())) for i in there}
    mean = float(np.mean(list(precision.values())))
    yield Number("zero_shot/mean_average_precision", mean, len(scores), split)
    rows = [(classes[i], int(labels[:, i].sum()), precision[i]) for i in there]
    yield Table("zero_shot/classes", ("class", "images", "average precision"), rows, split)


def _tupled(given: Any) -> Any:
    """A list as a file gives it, as settings hold it."""
    return tuple(cast("list[Any]", given)) if isinstance(given, list) else given


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} ({getattr(error, 'strerror', None) or error})") from error


def _lines(path: str) -> list[str]:
    return [line.strip() for line in _text(path).splitlines() if line.strip()]
