"""The interface between evaluations and what runs them. Everything here is shared; nothing here computes.

Shape letters: B samples of a batch, N of a stream, D feature size, C, H, W of an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.core.protocols import Batch, Objective

if TYPE_CHECKING:
    from pipeline.config.schema import Training
    from pipeline.dist.group import Place

T = TypeVar("T")
Value = str | int | float | None


class Number(NamedTuple):
    """One number of an evaluation."""

    name: str
    """Metric, e.g. "knn/top1"."""
    value: float
    n: int
    """Samples that it was measured on."""
    split: str
    stderr: float | None = None
    """Standard error of ``value``; None where none is known."""
    better: Literal["higher", "lower"] | None = "higher"
    """Which way is good, for marking the best model; None where neither is. One that has no ``stderr`` and no
    ``samples`` either tells how it was measured, and is not compared."""
    samples: np.ndarray | None = None
    """What each sample adds, bool or float32[n] in the order of the stream, with ``value`` as its mean: models are then
    compared sample by sample. None where a number is no mean over samples."""
    sources: np.ndarray | None = None
    """int64[n], the source of each of ``samples``, where several share one (captions of an image); None: none do."""


class Table(NamedTuple):
    """Numbers that belong together: of every class, of every severity."""

    name: str
    """E.g. "zero_shot/classes"."""
    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]
    """As long as ``columns`` each."""
    split: str


class Figure(NamedTuple):
    """A picture."""

    name: str
    """E.g. "embedding_map/classes"."""
    image: np.ndarray
    """uint8[H,W,3]."""
    caption: str
    split: str


Output = Number | Table | Figure


class Uses(NamedTuple):
    """What an evaluation looks at: nothing else is checked for it, or is part of the identity of its numbers."""

    streams: Mapping[str, Sequence[str]]
    """Stream to the fields of its batches, ``{"val": ("image", "label")}``."""
    encoders: Sequence[str] = ("image",)
    """"image", "text", "logits", "generator", "restorer"; those of the run that judges are "judge.NAME"."""
    also: Mapping[str, Sequence[str]] = MappingProxyType({})
    """Fields that are read too where the suite names them and the stream has them: only some models need them."""


class EvalStream(Protocol):
    """Every sample of a manifest once, in order, shared out over the ranks without padding."""

    classes: tuple[str, ...]
    samples: int
    fingerprint: str
    """Of the data set."""

    def __iter__(self) -> Iterator[Batch]:
        """This rank's batches; the last one may be smaller."""
        ...


class Reading(NamedTuple):
    """What is read off an image encoder: one vector an image. See :mod:`pipeline.nn.reading`."""

    blocks: int = 0
    """How many of the last blocks; 0: what the encoder itself gives."""
    pool: Literal["own", "cls", "mean", "cls+mean"] = "own"
    """Class tokens of those blocks side by side, mean of the last block's patches, or both, as DINOv2 reads them."""


OWN = Reading()
"""What the encoder itself gives."""


class Features(NamedTuple):
    """Of N samples, in the order of the manifest and the same on every rank; kept in main memory."""

    x: Tensor
    """float32[N,D]."""
    fields: Mapping[str, Tensor]
    """Fields of the samples that were asked for, [N,...] each."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of the labels."""

    @property
    def label(self) -> Tensor:
        """int64[N]."""
        return self.fields["label"]


class EvalContext(Protocol):
    """What an evaluation is given. Encoders are in eval mode on ``place.device``; no gradient is recorded."""

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        """By name; see :class:`Uses`."""
        ...

    @property
    def classes(self) -> Mapping[str, tuple[str, ...]]:
        """Encoder to the names of the classes that it was trained with; empty where it was told none."""
        ...

    @property
    def streams(self) -> Mapping[str, EvalStream]:
        """By name."""
        ...

    @property
    def place(self) -> Place:
        """Of this rank."""
        ...

    @property
    def folder(self) -> Path:
        """Of this evaluation alone, for what it wants to keep; rank 0 makes it when it writes the first file."""
        ...

    def features(
        self, encoder: str, stream: str, fields: Sequence[str] = ("label",), module: nn.Module | None = None
    ) -> Features:
        """Features of every sample of a stream. All ranks call this together; what is known already is not made anew.

        Args:
            encoder: name of the encoder; it maps "image".
            stream: name of the stream.
            fields: what else to keep of the samples; "image_digest" is int64[N,2], equal for equal images.
            module: in place of the encoder itself, one of its parts: the name ``encoder`` then names it for the cache.

        Raises:
            DataError: a field is not there, or the ranks' shares do not make up the stream.
        """
        ...

    def readings(
        self, encoder: str, stream: str, readings: Sequence[Reading], fields: Sequence[str] = ("label",)
    ) -> dict[Reading, Features]:
        """Several readings of an encoder of images from one pass over a stream; else as :meth:`features`.

        Raises:
            ConfigError: the encoder has no such blocks or tokens.
            DataError: as there.
        """
        ...

    def tokens(self, texts: Sequence[str]) -> Batch:
        """Any texts as the encoder "text" takes them: "text", int64[N,L], and "text_length", int64[N].

        Raises:
            ConfigError: the model was trained without texts.
        """
        ...

    def words(self, text: Batch) -> list[str]:
        """Texts as a person reads them, of "text", int64[N,L], and "text_length", int64[N], as far as tokens tell.

        Raises:
            ConfigError: as for :meth:`tokens`.
        """
        ...

    def train(self, objective: Objective, data: str | Path, training: Training) -> None:
        """Train an objective, which is the evaluation's own; on all ranks, through the one loop.

        Args:
            objective: on every rank the same.
            data: name of a stream whose data set it is, or the folder of one.
            training: how long and how.

        Raises:
            Mistakes: what does not fit the data or the number of ranks.
            NonFiniteError: on every rank in the same step.
        """
        ...

    @property
    def show(self) -> Callable[[str, int, int], None]:
        """For progress: what is being made, how many of it are, of how many. Streams show themselves."""
        ...

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` gives, or gave to another evaluation of the suite under the same ``key``."""
        ...


class Evaluation(ABC):
    """One protocol: ``evals/NAME.py`` holds a docstring naming the source, ``Config`` and the class."""

    version: ClassVar[int] = 1
    """Part of the identity of its numbers: one more whenever the protocol changes what they are."""
    trains: ClassVar[bool] = False
    """It trains through the loop (:meth:`EvalContext.train`), so that it cannot be run within a training."""

    @abstractmethod
    def uses(self) -> Uses:
        """Streams and encoders; a function of the settings alone."""

    def scores(self, classes: int) -> Mapping[str, tuple[float, float]]:
        """Metric to what it is for features that know nothing of the classes, and for those that know all.

        Contract tests try both. Left out are metrics for which there is no such value.
        """
        return {}

    def check(self, ctx: EvalContext) -> None:
        """Refuse what can be known to be impossible before anything is computed.

        Raises:
            ConfigError: settings that do not fit the streams or encoders.
        """
        return None

    @abstractmethod
    def run(self, ctx: EvalContext) -> Iterable[Output]:
        """Yield results, the same on every rank."""


class Maker(Protocol):
    """Whatever makes images: the encoder "generator". A module, whose device is that of its parameters."""

    classes: int
    """That it can be asked for; 0: none."""
    told: Literal["label", "text"] | None
    """The field that it is told of an image; None: it is told nothing."""

    def settings(self, values: Mapping[str, Any]) -> Any:
        """How to make them, from plain values; {}: as in the training run's showcase.

        Raises:
            ConfigError: with every mistake, also of what this model cannot do.
        """
        ...

    def make(self, ids: Tensor, prompt: Batch, seed: int, settings: Any) -> Tensor:
        """Make one image for each id; the same id, prompt and seed give the same image in any batch.

        Args:
            ids: int64[B], on the device to compute on.
            prompt: the fields that it is told, there too.
            seed: of all chance.
            settings: what :meth:`settings` has given.

        Returns:
            uint8[B,C,H,W].

        Raises:
            NonFiniteError: a sample is not finite.
        """
        ...


Kind = Literal["exact", "bound", "importance_weighted"]
"""Of a number of bits: those of the model's own density or probability, with nothing left out (a density is of images
that are dequantised by uniform noise, one for each: Theis et al. 2016, arXiv 1511.01844); at least those of the model's
marginal, in expectation (ELBO, variational bound); or the tighter bound by K draws (Burda et al. 2016, 1509.00519)."""


def bits_name(kind: Kind, draws: int | None = None) -> str:
    """What bits per dimension of a kind are called, wherever they are told: "bits_per_dim_exact".

    Args:
        kind: of the number.
        draws: K of "importance_weighted", which is a part of what the number is; no other kind has any.
    """
    assert (kind == "importance_weighted") == (draws is not None), "draws belong to importance weighting alone"
    return f"bits_per_dim_{kind}" if draws is None else f"bits_per_dim_{kind}_{draws}"


class Bits(NamedTuple):
    """How many bits per dimension images need."""

    kind: Kind
    parts: Mapping[str, Tensor]
    """Part to float64[B]; they add up. One part, "", where there are no others."""
    draws: int | None = None
    """K of "importance_weighted"."""

    @property
    def name(self) -> str:
        """See :func:`bits_name`."""
        return bits_name(self.kind, self.draws)

    @property
    def total(self) -> Tensor:
        """float64[B]."""
        return torch.stack([*self.parts.values()]).sum(dim=0)


@runtime_checkable
class Likely(Protocol):
    """A :class:`Maker` that also knows how likely an image is, exactly or by a bound."""

    image_shape: tuple[int, int, int]
    """C, H, W."""

    def check_likelihood(self, steps: int | None) -> None:
        """Refuse ``steps`` that it cannot be measured in; None: as its training says, and of what has no steps.

        Raises:
            ConfigError: with what is possible.
        """
        ...

    def likelihood(self, image: Tensor, ids: Tensor, prompt: Batch, seed: int, steps: int | None) -> Bits:
        """How many bits each image needs, and what kind of number that is; the same for an id in any batch.

        Args:
            image: uint8[B,C,H,W], on the device to compute on.
            ids: int64[B], numbers of the samples; with the seed they fix all chance.
            prompt: the fields that it is told.
            seed: of all chance.
            steps: see :meth:`check_likelihood`.
        """
        ...
