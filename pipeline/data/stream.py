"""The training stream: endless, resumable, a pure function of (manifest, seed, position)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.config.schema import Data, Image
from pipeline.core.errors import CheckpointError, ConfigError, DataError
from pipeline.core.manifest import Joined, Manifest
from pipeline.core.protocols import Batch, DataFacts
from pipeline.data.assemble import Assembler, Bad
from pipeline.data.mixture import Mixture, shares
from pipeline.data.order import Order, default_lanes
from pipeline.data.plan import TrainPlan
from pipeline.data.storage import check_shard
from pipeline.data.workers import Made, Workers

_FAIR_SAMPLE = 10_000


def facts(manifest: Manifest, image: Image) -> DataFacts:
    """What components may know of the data."""
    return DataFacts(image_size=image.shape, classes=manifest.classes)


def assemble_here(assembler: Assembler, first: int) -> Iterator[Made]:
    """Micro-batches from number ``first`` on, made in this process."""
    count = assembler.plan.count
    for number in itertools.count(first) if count is None else range(first, count):
        arrays = {n: np.empty((assembler.plan.size, *c.shape), c.dtype) for n, c in assembler.columns.items()}
        samples, bad = assembler.fill(number, arrays)
        yield Made({name: torch.from_numpy(array[:samples]) for name, array in arrays.items()}, bad)


class TrainStream:
    """A rank's part of the stream; see :func:`open_stream`."""

    def __init__(
        self, assembler: Assembler, plan: TrainPlan, fingerprint: str, *, workers: int, max_bad: float
    ) -> None:
        self._assembler = assembler
        self._plan = plan
        self._fingerprint = fingerprint
        self._workers = Workers(assembler, workers) if workers else None
        self._max_bad = max_bad
        self._seen = 0
        self._bad = 0
        self._ledger: list[Bad] = []

    def batches(self, step: int) -> Iterator[list[Batch]]:
        """From global step ``step`` on: for each step, this rank's micro-batches in order.

        Raises:
            DataError: a damaged shard, a dead loader process, or more bad samples than allowed.
        """
        accumulation = self._plan.accumulation
        first = step * accumulation
        made = self._workers.batches(first) if self._workers else assemble_here(self._assembler, first)
        while True:
            parts = list(itertools.islice(made, accumulation))
            for part in parts:
                self._count(part)
            yield [part.batch for part in parts]

    def ledger(self) -> list[dict[str, Any]]:
        """This rank's bad samples since the last call: step, epoch, id, shard, key, reason, substitute."""
        lines = [bad.as_dict() for bad in self._ledger]
        self._ledger.clear()
        return lines

    def state(self, step: int) -> dict[str, Any]:
        """The position before global step ``step`` and all that fixes the order; plain JSON values."""
        state = {"step": step, "manifest": self._fingerprint} | self._plan.order.identity
        if self._assembler.text:
            state["tokenizer"] = self._assembler.text.sha256
        return state

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise CheckpointError if ``state`` is of another order than this stream's."""
        own = self.state(state["step"])
        changed = [f"{k}: checkpoint {state.get(k)!r}, now {v!r}" for k, v in own.items() if state.get(k) != v]
        if changed:
            raise CheckpointError(
                "the order of samples is not the checkpoint's, so samples would be lost or repeated "
                f"({'; '.join(changed)}); use the settings and data of the checkpoint, or start a new run"
            )

    def close(self) -> None:
        """Stop workers and release files."""
        if self._workers:
            self._workers.close()
        self._assembler.close()

    def _count(self, made: Made) -> None:
        """Keep the ledger, and stop when too many samples are bad."""
        self._seen += len(made.batch["id"])
        self._bad += len(made.bad)
        self._ledger += made.bad
        # A fraction of a few samples says nothing, so at least a fair number is presumed to have been seen.
        allowed = self._max_bad * max(self._seen, min(self._plan.order.samples, _FAIR_SAMPLE))
        if made.bad and self._bad > allowed:
            last = made.bad[-1]
            raise DataError(
                f"{self._bad} of {self._seen} samples could not be used, more than data.max_bad = {self._max_bad} "
                f"allows; the last one: {last.shard}, sample {last.key!r}: {last.reason}"
            )


def open_stream(
    data: Data, manifest: Manifest, *, seed: int, global_batch: int, micro_batch: int, rank: int, world: int
) -> TrainStream:
    """The stream of one rank. Loader processes start at once, in the background.

    Args:
        data: fields, geometry, lanes, window, tail, workers.
        manifest: the data set.
        seed: of the order and of crops and flips.
        global_batch: samples per step over all ranks.
        micro_batch: samples per rank and forward.
        rank: this rank; it takes samples [rank, rank + 1) * global_batch / world of the lane-major global batch.
        world: number of ranks.

    Raises:
        ConfigError: the batch does not divide, exceeds the data, or a field is unknown.
        DataError: a shard is missing or its size is not the manifest's.
    """
    if global_batch % (world * micro_batch):
        raise ConfigError(
            f"run.global_batch = {global_batch} is not a multiple of {world} ranks x engine.micro_batch = {micro_batch}"
        )
    parts = manifest.parts if isinstance(manifest, Joined) else (manifest,)
    for part in parts:
        for shard in part.shards[rank::world]:
            check_shard(part, shard)
    plan = TrainPlan(_order(data, parts, seed, global_batch), micro_batch, rank, world)
    assembler = Assembler(manifest, data, seed, plan)
    return TrainStream(assembler, plan, manifest.fingerprint, workers=data.workers, max_bad=data.max_bad)


def _order(data: Data, parts: Sequence[Manifest], seed: int, global_batch: int) -> Order | Mixture:
    """The order of one source, or of several."""
    sources = () if isinstance(data.train, str) else data.train
    orders = []
    for part, share in zip(parts, shares(global_batch, [s.weight for s in sources] or [1.0]), strict=True):
        if share > part.samples:
            raise ConfigError(
                f"run.global_batch = {global_batch} takes {share} samples of {part.root}, which has {part.samples}"
            )
        lanes = data.lanes or default_lanes(share, len(part.shards))
        if share % lanes:
            raise ConfigError(f"data.lanes = {lanes} does not divide the {share} samples of a batch from {part.root}")
        orders.append(Order(np.array(part.starts, np.int64), seed, share, lanes, data.window, data.tail))
    return orders[0] if len(orders) == 1 else Mixture(tuple(orders))
