"""The interfaces between the rooms of the house. Everything here is shared; nothing here computes.

Shape letters: B samples of one micro-batch on one rank, H height, W width, D feature size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol, Self, TypeVar, overload

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from pipeline.config.durations import Duration
from pipeline.core.random import SampleRandom

T = TypeVar("T")

Batch = dict[str, Tensor]
"""Field name to tensor. Always holds ``"id"``: int64[B], the sample's number in its manifest, and ``"epoch"``:
int64[B], the epoch that delivered it. Images are ``"image"``: uint8[B,3,H,W] (``"image2"`` for a second view), labels
``"label"``: int64[B]. Samples of a data set beside the first have its name before each field: ``"target_image"``; their
ids begin where those of the data sets before end."""


class StepOutput(NamedTuple):
    """What one forward gives. A NamedTuple, since DeepSpeed's ZeRO-3 hooks only walk tuples, lists and dicts."""

    loss: Tensor
    """Scalar, the mean over this rank's micro-batch."""
    metrics: dict[str, Tensor]
    """Detached scalars (means over the micro-batch), with the same keys in the same order on every rank."""
    losses: Tensor | None = None
    """float32[B], detached: each sample's part, whose mean is ``loss``; None where that is no mean over samples."""
    features: Tensor | None = None
    """float[B,D], detached: what the encoder gave in this forward, one vector per sample, so that a run sees them
    collapse ("features_std" and "features_rank" of its metrics); None where the method has no such vectors."""


class Picture(NamedTuple):
    """A picture for TensorBoard and the report."""

    image: np.ndarray
    """uint8[H,W,3]."""
    caption: str


@dataclass(frozen=True)
class Clock:
    """Where the run is. The master clock counts samples; a step is one update of the optimizer."""

    step: int
    """Updates done."""
    samples: int
    """Samples seen by all ranks together."""
    total_samples: int
    """Samples at which the run is finished."""

    @property
    def progress(self) -> float:
        """The part of the run that is done, 0 to 1."""
        return self.samples / self.total_samples


@dataclass(frozen=True)
class StepContext:
    """What an objective may know beside its batch. The same context and batch give the same loss."""

    seed: int
    clock: Clock
    training: bool = True
    phase: str = ""
    """Whose loss is wanted; "" where the objective has no phases."""
    repeat: int = 0
    """Updates that this phase has made in this step."""
    words: Callable[[Batch], list[str]] | None = None
    """Reads the field "text" of a batch; given to showcases where the data has texts."""

    def random(self, batch: Batch, purpose: str) -> SampleRandom:
        """Random numbers that belong to the samples of ``batch``: a function of (seed, epoch, id, purpose) alone.

        All phases of a step draw the same ones, unless the purpose names the phase; a phase that makes several updates
        in a step draws anew for each.
        """
        purpose = f"{purpose}/{self.repeat}" if self.repeat else purpose
        return SampleRandom(self.seed, purpose, batch["epoch"], batch["id"])


class Objective(nn.Module, ABC):
    """Modules and maths of a training method. No optimizer, no files, no ranks, no precision, no schedule.

    A component file ``objectives/NAME.py`` holds a docstring naming the paper, ``class Config`` (frozen, see
    :class:`pipeline.config.schema.Strict`) and the class, built as ``Class(config)``; labels' count and the like
    come with :class:`DataFacts`.
    """

    needs: Mapping[str, str] = {}
    """Fields of the batch and their type, ``{"image": "uint8[B,3,H,W]"}``: checked against the first batch."""
    second_order: bool = False
    """Its loss holds a gradient of its own network, which is taken within forward; see ``pipeline.run.build``."""

    @abstractmethod
    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """Loss and metrics of one micro-batch."""

    def phases(self) -> Mapping[str, Sequence[str]]:
        """Updates that make a step, in this order, where there are several: the prefixes of what each trains.

        ``{"generator": ["decoder."], "critic": ["critic."]}``: the loss that ``forward`` gives under ``ctx.phase``
        moves the parameters of that phase alone. Every trained parameter belongs to one. Empty: one update of all.
        """
        return {}

    def surveys(self) -> Mapping[str, Survey]:
        """Looks at a whole data set with the present weights, every so often: for pseudo-labels, clusters, centres."""
        return {}

    def look(self, survey: str, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """What a survey keeps of a batch, a row per sample: [B,...]; in eval mode, without gradient."""
        raise NotImplementedError(f"{type(self).__name__} surveys {survey!r} without looking")

    def surveyed(self, survey: str, rows: dict[str, Tensor], ctx: StepContext) -> None:
        """Make something of a survey, in persistent buffers, the same on every rank.

        Every rank has the rows of its own samples, [n,...], with their "id" as in training batches; n differs between
        ranks, so what is made of all of them takes collectives (sums; ``pipeline.dist.gather`` for something small).
        What torch's global generator draws is the same on all ranks. A sample that cannot be used is replaced by the
        next one, so that an id may come twice, and another not at all: neither does it in training.
        """
        raise NotImplementedError(f"{type(self).__name__} makes nothing of its survey {survey!r}")

    def fresh(self, survey: str) -> Mapping[str, Tensor]:
        """Trained parameters that begin anew after a survey, by name: their values, drawn from torch's generator.

        The engine puts them in place on every rank, and the optimizer forgets what it remembered of them.
        """
        return {}

    def frozen(self) -> Mapping[str, Origin]:
        """Submodules that are never trained and come from a file, such as a teacher: ``{"teacher": Origin(path)}``.

        The constructor builds them, without gradient; training fills them from their files, checkpoints name these by
        their hash. Evaluation and export do without the files, so no encoder may use such a part, unless its origin
        says that it is kept.
        """
        return {}

    def taught(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """What each teacher makes of a batch, [B,D] by name: what `sluice prep embed` stores, to be read in its place.

        Of the batch as it is: nothing random but what the stream has drawn.
        """
        return {}

    def train(self, mode: bool = True) -> Self:
        """As any module, but that frozen parts stay in eval mode."""
        super().train(mode)
        for part in self.frozen():
            self.get_submodule(part).eval()
        return self

    def encoders(self) -> dict[str, nn.Module]:
        """Modules that evaluation and export may use; ``"image"`` maps uint8[B,3,H,W] to float[B,D]."""
        return {}

    def after_step(self, clock: Clock) -> None:
        """Called after each update of the optimizer and the averages, for queues and the like."""
        return None

    def averages(self, clock: Clock) -> Iterable[Average]:
        """Frozen parameters that the engine moves after each update, wherever it keeps them: momentum encoders."""
        return ()

    def limits(self) -> Mapping[str, tuple[float, float]]:
        """Least and largest value of trained parameters, by name; the engine holds the master weights to them."""
        return {}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed, beside those of one dimension."""
        return set()

    def layers(self) -> Sequence[Sequence[str]]:
        """Prefixes of parameter names from the input to the output, for layer-wise learning rates; empty: none."""
        return ()

    def inputs(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """What the model sees of the images of a batch in a step, uint8[B,C,H,W] by name: `sluice look` shows it."""
        return {name: value for name, value in batch.items() if value.ndim == 4 and value.dtype == torch.uint8}

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """Pictures that let a person judge the method; called now and then on a few samples, without gradient."""
        return {}

    def exports(self) -> Mapping[str, Export]:
        """Files for other libraries by their path in the export's folder, "open_clip/open_clip_config.json".

        ``sluice export`` writes them beside what it writes for every objective: all weights, and the encoder for timm.
        """
        return {}


class Survey(NamedTuple):
    """A look at a data set with the weights of that moment."""

    every: Duration
    """From one to the next; the first is before the first update. Zero: never."""
    data: str = ""
    """Which data set: one beside the first, or ""; with its fields, and images cut out of the centre."""
    samples: int | None = None
    """So many, drawn once for all; at least one for each rank. None: all."""


class Origin(NamedTuple):
    """Where the weights of a frozen part come from."""

    path: str
    """Safetensors, or what ``torch.load`` reads without unpickling freely."""
    sha256: str | None = None
    """That the file must have; None: whatever it has when the run begins, and the same ever after."""
    fill: Callable[[str], None] | None = None
    """Fills the part from the file; None: the file holds the part's tensors under their names, and no others."""
    stored: bool = False
    """Its outputs are read in place of the file, which has ``sha256``: it need not be there, but may not be another."""
    kept: bool = False
    """It is in checkpoints and exports too, for encoders that use it: an autoencoder that samples are decoded by."""


class Export(NamedTuple):
    """A file that another library loads."""

    content: Mapping[str, Tensor] | str | None
    """Tensors, for a safetensors file; text; or None where that library cannot hold this model."""
    note: str = ""
    """A line for the user: how it is loaded, or why there is none."""
    metadata: Mapping[str, str] = {}
    """Of a safetensors file."""


class Average(NamedTuple):
    """A frozen parameter that follows a trained one."""

    target: nn.Parameter
    source: nn.Parameter
    keep: float
    """target = keep * target + (1 - keep) * source."""


class Embeddings(NamedTuple):
    """What a pairwise objective makes of a micro-batch before samples are compared with each other."""

    rows: dict[str, Tensor]
    """[B,...], a row per sample."""
    shared: dict[str, Tensor]
    """Trained tensors that the loss uses beside them, of shape (1,): temperature, bias."""


class PairwiseObjective(Objective):
    """A loss that compares samples with each other, so that it is not the mean of the losses of a batch's parts.

    It is cut in two, so that accumulation can embed micro-batches one by one and compute the loss once, over all of
    them. ``loss`` is given embeddings in the types in which ``embed`` and ``shared`` made them, however many
    micro-batches there are: numbers of samples stay whole numbers.
    """

    compares: bool = True
    """False where, as it is set, the loss is a mean over samples after all: accumulation then needs no second pass."""

    @abstractmethod
    def embed(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """One row per sample; random numbers belong to the samples, so that a second call gives the same."""

    @abstractmethod
    def loss(self, embeddings: Embeddings, ctx: StepContext) -> StepOutput:
        """The mean over this rank's samples; uses trained parameters only as ``embeddings.shared``."""

    def shared(self) -> dict[str, Tensor]:
        """Trained tensors that the loss uses."""
        return {}

    @overload
    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput: ...

    @overload
    def forward(self, batch: Batch, ctx: StepContext, then: Callable[[Embeddings], T]) -> T: ...

    def forward(self, batch: Batch, ctx: StepContext, then: Callable[[Embeddings], T] | None = None) -> StepOutput | T:
        """What ``then`` makes of the embeddings: the loss, if nothing else is asked for.

        Parameters are read in here alone, since engines wrap this call and may take them away after it.
        """
        embeddings = Embeddings(self.embed(batch, ctx), self.shared())
        return self.loss(embeddings, ctx) if then is None else then(embeddings)


@dataclass(frozen=True)
class SetFacts:
    """What a component may need to know of one data set."""

    samples: int = 0
    classes: tuple[str, ...] = ()
    """Names of the classes, in the order of their labels; empty when the data has no labels."""
    domains: tuple[str, ...] = ()
    """Names of the domains that its samples come from, in the order of their numbers."""
    first: int = 0
    """Id of its first sample: ids in a batch run on through all data sets."""
    sources: tuple[tuple[int, int], ...] = ()
    """Of each source that it is mixed of, the id of the first sample and the number of the domain."""


@dataclass(frozen=True)
class DataFacts:
    """What a component may need to know of the data to build itself; read from manifests by ``pipeline.data.facts``."""

    image_size: tuple[int, int]
    """Height and width of the images in a batch."""
    classes: tuple[str, ...]
    """Of the first data set, as the next two and ``sources``; see :class:`SetFacts`."""
    samples: int = 0
    domains: tuple[str, ...] = ()
    beside: Mapping[str, SetFacts] = field(default_factory=dict[str, SetFacts])
    """Of the data sets beside the first, by name."""
    views: tuple[tuple[int, int], ...] = ()
    """Height and width of each view of an image in a batch, "image", "image2", ...; empty where nobody says: one."""
    sources: tuple[tuple[int, int], ...] = ()
    stored: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    """What fields of stored outputs say of themselves, by the field's name: teacher, widths, augmentations."""

    def plain(self) -> dict[str, Any]:
        """Plain JSON values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> DataFacts:
        """From what :meth:`plain` gave; checkpoints of earlier versions hold image size and classes alone."""
        return TypeAdapter(cls).validate_python(values)


class Stream(Protocol):
    """Endless, resumable, and a pure function of (manifest, seed, position)."""

    def batches(self, step: int) -> Iterator[list[Batch]]:
        """From global step ``step`` on: for each step, this rank's micro-batches in order."""
        ...

    def state(self, step: int) -> dict[str, Any]:
        """The position before global step ``step`` and all that fixes the order; plain JSON values."""
        ...

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise :class:`~pipeline.core.errors.CheckpointError` if ``state`` is of another order than this stream's."""
        ...

    def ledger(self) -> list[dict[str, Any]]:
        """This rank's samples that could not be used and were replaced since the last call; plain JSON values."""
        ...

    def events(self) -> dict[str, int]:
        """How often each kind of event happened in this rank's batches since the last call; always the same kinds."""
        ...

    def close(self) -> None:
        """Stop workers and release files."""
        ...
