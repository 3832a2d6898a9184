"""The evaluation stream: every sample once, in order, shared out over the ranks without padding."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from pipeline.config.schema import Captions, Data, Image
from pipeline.core.manifest import load
from pipeline.core.protocols import Batch
from pipeline.data.access import check_shard
from pipeline.data.assemble import Assembler
from pipeline.data.reading import EvalReading
from pipeline.data.stream import assemble_here
from pipeline.data.workers import Workers


class OrderedStream:
    """A rank's part of a data set; see :func:`open_eval`. It can be walked any number of times."""

    def __init__(
        self, assembler: Assembler, *, classes: tuple[str, ...], samples: int, workers: int, fingerprint: str
    ) -> None:
        self.classes = classes
        self.fingerprint = fingerprint
        self.samples = samples
        self._assembler = assembler
        self._wanted = workers
        self._workers: Workers | None = None

    def __iter__(self) -> Iterator[Batch]:
        """This rank's batches; the last one may be smaller.

        Raises:
            DataError: a sample cannot be used; none is replaced here.
        """
        if self._wanted and self._workers is None:
            self._workers = Workers(self._assembler, self._wanted)
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


def open_eval(
    folder: str | os.PathLike[str],
    image: Image,
    fields: Sequence[str],
    *,
    batch: int,
    workers: int,
    rank: int,
    world: int,
    captions: Captions | None = None,
    tokenizer: bytes | None = None,
) -> OrderedStream:
    """The stream of one rank: samples [rank, rank + 1) * N / world.

    Args:
        folder: a data set.
        image: geometry; "center" or "resize" crops give the same pixels on every pass.
        fields: fields of a batch.
        batch: samples of a batch on this rank.
        workers: loader processes; they start with the first batch. 0: none.
        rank: this rank.
        world: number of ranks.
        captions: for the field "text"; left out: the data set's.
        tokenizer: of the field "text", as its file; left out: the data set's, or the one that ``captions`` names.

    Raises:
        ConfigError: an unknown field.
        DataError: no manifest, or a shard is missing or its size is not the manifest's.
    """
    manifest = load(folder)
    for shard in manifest.shards[rank::world]:
        check_shard(manifest, shard)
    reading = EvalReading(rank * manifest.samples // world, (rank + 1) * manifest.samples // world, batch)
    data = Data(train=os.fspath(folder), fields=tuple(fields), image=image, captions=captions or Captions())
    assembler = Assembler(manifest, data, 0, reading, tokenizer)
    return OrderedStream(
        assembler,
        classes=manifest.classes,
        samples=manifest.samples,
        workers=workers,
        fingerprint=manifest.fingerprint,
    )
