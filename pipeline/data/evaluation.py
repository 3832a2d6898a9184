"""The evaluation stream: every sample once, in order, shared out over the ranks without padding."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from pipeline.config.schema import Captions, Component, Data, EvalData, Image
from pipeline.core.manifest import Manifest
from pipeline.core.protocols import Batch
from pipeline.data.access import check_shard
from pipeline.data.assemble import Assembler
from pipeline.data.dataset import open_data
from pipeline.data.device import Receive, copied, pinned
from pipeline.data.reading import EvalReading
from pipeline.data.selection import identity, read_sets
from pipeline.data.stream import assemble_here
from pipeline.data.workers import Workers


class OrderedStream:
    """A rank's part of a data set; see :func:`open_eval`. It can be walked any number of times.

    ``facts`` are all that decides what its batches hold, but for where they are cut, as plain values.
    """

    def __init__(
        self,
        assembler: Assembler,
        *,
        classes: tuple[str, ...],
        samples: int,
        workers: int,
        fingerprint: str,
        facts: Mapping[str, Any],
        cut: bool = False,
        receive: Receive = copied,
    ) -> None:
        self.classes = classes
        self.fingerprint = fingerprint
        self.facts = facts
        self.samples = samples
        self.cut = cut
        self._assembler = assembler
        self._wanted = workers
        self._receive = receive
        self._workers: Workers | None = None

    def __iter__(self) -> Iterator[Batch]:
        """This rank's batches; the last one may be smaller.

        Raises:
            DataError: a sample cannot be used; none is replaced here.
        """
        if self._wanted and self._workers is None:
            self._workers = Workers(self._assembler, self._wanted, self._receive)
        for made in self._workers.batches(0) if self._workers else assemble_here(self._assembler, 0):
            yield made.batch

    @property
    def tokenizer(self) -> str | None:
        """Hash of the tokenizer; None without the field "text"."""
        return self._assembler.text.sha256 if self._assembler.text else None

    def close(self) -> None:
        """Stop workers and release files."""
        if self._workers is not None:
            self._workers.close()
        self._assembler.close()


class Part(NamedTuple):
    """What a rank looks at."""

    rank: int
    world: int
    limit: int | None = None
    """Only the first so many samples of the data set are shared out; None: all."""


WHOLE = Part(0, 1)


def open_eval(
    data: EvalData | str | os.PathLike[str],
    image: Image,
    fields: Sequence[str],
    *,
    batch: int,
    workers: int,
    part: Part = WHOLE,
    captions: Captions | None = None,
    tokenizer: bytes | None = None,
    settings: Mapping[str, Component] | None = None,
) -> OrderedStream:
    """The stream of one rank: whole batches, [rank, rank + 1) / world of them.

    Batches are cut where they would be for one rank, since what an encoder makes of an image depends, in the last bits,
    on how many others are in the batch: so numbers are the same at any number of ranks. Where there is a GPU, they are
    in pinned memory.

    Args:
        data: a data set of shards, or a part of it.
        image: geometry; "center" or "resize" crops give the same pixels on every pass.
        fields: fields of a batch.
        batch: samples of a batch on this rank.
        workers: loader processes; they start with the first batch. 0: none.
        part: of the data set, for this rank.
        captions: for the field "text"; left out: the data set's.
        tokenizer: of the field "text", as its file; left out: the data set's, or the one that ``captions`` names.
        settings: of fields, see ``data.field``.

    Raises:
        ConfigError: an unknown field; a list or a condition that cannot be read.
        DataError: no manifest, or a shard is missing or its size is not the manifest's.
    """
    rank, world, limit = part
    own = data if isinstance(data, EvalData) else EvalData(path=os.fspath(data))
    asked = _asked(own, image, fields, settings or {}).model_copy(update={"captions": captions or Captions()})
    manifest = open_data(asked, own.path)
    for own in read_sets(manifest):
        for shard in own.shards[rank::world]:
            check_shard(own, shard)
    samples = manifest.samples if limit is None else min(limit, manifest.samples)
    batches = -(-samples // batch)
    first, last = (min(r * batches // world * batch, samples) for r in (rank, rank + 1))
    reading = EvalReading(first, last, batch)
    assembler = Assembler(manifest, asked, 0, reading, tokenizer)
    return OrderedStream(
        assembler,
        classes=manifest.classes,
        samples=samples,
        cut=samples < manifest.samples,
        workers=workers,
        fingerprint=manifest.fingerprint,
        facts=_facts(manifest, asked, assembler) | {"samples": samples},
        receive=pinned if torch.cuda.is_available() else copied,
    )


def _facts(manifest: Manifest, data: Data, assembler: Assembler) -> dict[str, Any]:
    """What decides what batches hold."""
    facts = identity(manifest) | {"image": data.image.model_dump(mode="json")}
    decided = data.model_dump(mode="json", include={"fields", "field", "captions"})
    return facts | decided | {"tokenizer": assembler.text.sha256 if assembler.text else None}


def _asked(data: EvalData, image: Image, fields: Sequence[str], settings: Mapping[str, Component]) -> Data:
    """What a run would be told of the same data."""
    return Data(
        train=data.path,
        **data.rules,
        sidecar=data.sidecar,
        fields=tuple(fields),
        field={name: own for name, own in settings.items() if name in fields},
        image=image,
    )
