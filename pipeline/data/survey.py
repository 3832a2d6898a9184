"""Every sample of one of a run's data sets once, for objectives that look at all of it now and then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, nullcontext
from typing import Any

from pipeline.config.schema import Data, Image
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.manifest import Manifest, load
from pipeline.core.protocols import Batch
from pipeline.data.assemble import Assembler, Bad
from pipeline.data.reading import SurveyReading
from pipeline.data.stream import FAIR_SAMPLE, assemble_here
from pipeline.data.workers import Workers


class SurveyStream:
    """A rank's part of a data set; see :func:`open_survey`. It can be walked any number of times.

    Args:
        data: of this data set.
        manifest: likewise.
        reading: which samples.
        first: id of its first sample in training batches.
        seed: of the run.
    """

    def __init__(self, data: Data, manifest: Manifest, reading: SurveyReading, first: int, seed: int) -> None:
        self.batches = reading.most
        self._assembler = Assembler(manifest, data, seed, reading)
        self._data, self._first = data, first
        self._fair = min(manifest.samples, FAIR_SAMPLE)
        self._ledger: list[Bad] = []

    def __iter__(self) -> Iterator[Batch]:
        """This rank's batches; the last one may be smaller. Loader processes live as long as the walk.

        Raises:
            DataError: a damaged shard, or more samples than allowed that cannot be used; others are replaced.
        """
        seen = bad = 0
        workers = Workers(self._assembler, self._data.workers) if self._data.workers else None
        with closing(workers) if workers else nullcontext():
            for made in workers.batches(0) if workers else assemble_here(self._assembler, 0):
                seen, bad = seen + made.filled.samples, bad + len(made.filled.bad)
                self._ledger += made.filled.bad
                if made.filled.bad and bad > self._data.max_bad * max(seen, self._fair):
                    last = made.filled.bad[-1]
                    raise DataError(
                        f"{bad} of {seen} samples could not be used in a survey, more than data.max_bad = "
                        f"{self._data.max_bad} allows; the last one: {last.shard}, sample {last.key!r}: {last.reason}"
                    )
                yield made.batch | {"id": made.batch["id"] + self._first}

    def ledger(self) -> list[dict[str, Any]]:
        """This rank's samples that were replaced since the last call: epoch, id, shard, key, reason, substitute."""
        lines = [bad.as_dict() for bad in self._ledger]
        self._ledger.clear()
        return [
            {**line, "id": line["id"] + self._first, "substitute": line["substitute"] + self._first} for line in lines
        ]

    def close(self) -> None:
        """Release files."""
        self._assembler.close()


def open_survey(
    data: Data,
    manifest: Manifest,
    name: str,
    *,
    batch: int,
    seed: int,
    rank: int,
    world: int,
    samples: int | None = None,
) -> SurveyStream:
    """The samples that one rank looks at. Ids are those of training batches.

    Args:
        data: of the run.
        manifest: of ``data.train``.
        name: a data set beside the first; "": the first.
        batch: samples at a time.
        seed: of the run.
        rank: this rank.
        world: number of ranks.
        samples: how many are looked at, at least one for each rank; None: all.

    Raises:
        ConfigError: no such data set, or fewer samples than ranks.
    """
    if name and name not in data.beside:
        there = ", ".join(data.beside) or "none"
        raise ConfigError(
            f"the objective surveys the data set {name!r}, which is not beside the first (there: {there}); "
            f"add [data.beside.{name}]"
        )
    first, image, changes = 0, data.image, {}
    if name:
        beside = data.beside[name]
        others = [load(other.path) for other in list(data.beside.values())[: list(data.beside).index(name)]]
        first = manifest.samples + sum(other.samples for other in others)
        manifest, image = load(beside.path), beside.image or data.image
        changes = {"train": beside.path, "fields": beside.fields}
    if manifest.samples < world:
        raise ConfigError(f"a survey of {manifest.samples} samples cannot be shared out to {world} ranks; use fewer")
    whole = Image(size=image.size, crop="center")
    own = data.model_copy(update={**changes, "image": whole, "decode": "loader", "beside": {}, "lanes": None})
    wanted = None if samples is None else max(samples, world)
    reading = SurveyReading(manifest.samples, batch, rank, world, wanted)
    return SurveyStream(own, manifest, reading, first, seed)
