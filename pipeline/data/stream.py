"""The training stream: endless, resumable, a pure function of (manifest, seed, position)."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.config.schema import Data
from pipeline.core.errors import CheckpointError, ConfigError, DataError
from pipeline.core.manifest import Manifest
from pipeline.core.protocols import Batch
from pipeline.data.access import check_shard
from pipeline.data.assemble import Assembler, Bad, Filler
from pipeline.data.dataset import open_beside
from pipeline.data.decode import ImageDecoder
from pipeline.data.device import DeviceImages, Encoded, Receive, copied, pinned
from pipeline.data.mixture import Mixture, shares
from pipeline.data.order import Order, default_lanes
from pipeline.data.reading import TrainReading
from pipeline.data.selection import identity, read_sets, sources
from pipeline.data.together import Together
from pipeline.data.workers import Made, Workers

_CPU = torch.device("cpu")
FAIR_SAMPLE = 10_000


def assemble_here(filler: Filler, first: int, receive: Receive | None = None) -> Iterator[Made]:
    """Micro-batches from number ``first`` on, made in this process."""
    count = filler.reading.count
    for number in itertools.count(first) if count is None else range(first, count):
        arrays = {n: np.empty((filler.reading.size, *c.shape), c.dtype) for n, c in filler.columns.items()}
        filler.expect(number + 1)
        filled = filler.fill(number, arrays)
        arrays = {name: array[: filled.samples] for name, array in arrays.items()}
        # Nobody writes to these arrays again, so they can be the batch.
        batch = receive(arrays) if receive else {name: torch.from_numpy(array) for name, array in arrays.items()}
        yield Made(batch, filled)


class _Set(NamedTuple):
    """One of the data sets that a batch holds samples of."""

    prefix: str
    """Of its columns."""
    assembler: Assembler
    reading: TrainReading
    manifest: Manifest
    decoder: ImageDecoder | None
    """Of its images."""
    ratio: int
    """Its samples for each of the first data set's."""

    @property
    def identity(self) -> dict[str, Any]:
        """All that fixes its samples and their order."""
        facts = identity(self.manifest) | self.reading.order.identity
        if self.assembler.text:
            facts["tokenizer"] = self.assembler.text.sha256
        return {self.prefix + name: value for name, value in facts.items()}


class TrainStream:
    """A rank's part of the stream; see :func:`open_stream`."""

    def __init__(
        self, sets: Sequence[_Set], reading: TrainReading, *, workers: int, max_bad: float, receive: Receive | None
    ) -> None:
        assemblers = {s.prefix: s.assembler for s in sets}
        ratios = {s.prefix: s.ratio for s in sets}
        self._reading = reading
        self._filler: Filler = Together(assemblers, ratios) if len(sets) > 1 else sets[0].assembler
        self._receive = receive
        self._workers = Workers(self._filler, workers, receive or copied) if workers else None
        self._identity = {name: value for s in sets for name, value in s.identity.items()}
        self._max_bad = max_bad
        # A fraction of a few samples says nothing, so at least a fair number is presumed to have been seen.
        self._fair = min(sum(s.reading.order.samples for s in sets), FAIR_SAMPLE)
        self._each = sum(ratios.values())
        self._seen = 0
        self._bad = 0
        self._ledger: list[Bad] = []
        self._kinds = ("replaced_samples", *dict.fromkeys(k for a in assemblers.values() for k in a.kinds))
        self._events: Counter[str] = Counter()

    def batches(self, step: int) -> Iterator[list[Batch]]:
        """From global step ``step`` on: for each step, this rank's micro-batches in order.

        Raises:
            DataError: a damaged shard, a dead loader process, or more bad samples than allowed.
        """
        accumulation = self._reading.accumulation
        first = step * accumulation
        made = self._workers.batches(first) if self._workers else assemble_here(self._filler, first, self._receive)
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

    def events(self) -> dict[str, int]:
        """How often each kind of event happened in this rank's batches since the last call; always the same kinds."""
        counts = {kind: self._events[kind] for kind in self._kinds}
        self._events.clear()
        return counts

    def state(self, step: int) -> dict[str, Any]:
        """The position before global step ``step`` and all that fixes the order; plain JSON values."""
        return {"step": step} | self._identity

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise CheckpointError if ``state`` is of another order than this stream's."""
        own = self.state(state["step"])
        both = {**own, **state}
        changed = [f"{k}: checkpoint {state.get(k)!r}, now {own.get(k)!r}" for k in both if state.get(k) != own.get(k)]
        if changed:
            raise CheckpointError(
                "the order of samples is not the checkpoint's, so samples would be lost or repeated "
                f"({'; '.join(changed)}); use the settings and data of the checkpoint, or start a new run"
            )

    def close(self) -> None:
        """Stop workers and release files."""
        if self._workers:
            self._workers.close()
        self._filler.close()

    def _count(self, made: Made) -> None:
        """Keep the ledger, and stop when too many samples are bad."""
        bad = made.filled.bad
        self._seen += self._each * made.filled.samples
        self._bad += len(bad)
        self._ledger += bad
        self._events.update(made.filled.events)
        self._events["replaced_samples"] += len(bad)
        allowed = self._max_bad * max(self._seen, self._fair)
        if bad and self._bad > allowed:
            last = bad[-1]
            raise DataError(
                f"{self._bad} of {self._seen} samples could not be used, more than data.max_bad = {self._max_bad} "
                f"allows; the last one: {last.shard}, sample {last.key!r}: {last.reason}"
            )


def open_stream(
    data: Data,
    manifest: Manifest,
    *,
    seed: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world: int,
    device: torch.device = _CPU,
) -> TrainStream:
    """The stream of one rank. Loader processes start at once, in the background.

    Args:
        data: fields, geometry, lanes, window, tail, workers.
        manifest: the data set ``data.train``; those beside it are loaded here.
        seed: of the order and of crops and flips.
        global_batch: samples per step over all ranks.
        micro_batch: samples per rank and forward.
        rank: this rank; it takes samples [rank, rank + 1) * global_batch / world of the lane-major global batch.
        world: number of ranks.
        device: where batches go: for a GPU they are in pinned memory, and images can be decoded there.

    Raises:
        ConfigError: the batch does not divide, exceeds the data, or a field is unknown; no GPU to decode on.
        DataError: a shard is missing or its size is not the manifest's.
    """
    if global_batch % (world * micro_batch):
        raise ConfigError(
            f"run.global_batch = {global_batch} is not a multiple of {world} ranks x engine.micro_batch = {micro_batch}"
        )
    if data.decode == "device" and device.type != "cuda":
        raise ConfigError('data.decode = "device" needs a GPU, and this rank has none; set data.decode = "loader"')
    if data.decode == "device" and (more := [name for name, b in data.beside.items() if b.ratio > 1]):
        raise ConfigError(
            f'data.beside.{more[0]}.ratio: with data.decode = "device" data sets have as many images each; leave it '
            'out, or set data.decode = "loader"'
        )
    own = data.model_copy(update={"read_mb": max(1, data.read_mb // (1 + len(data.beside)))})
    wanted = [("", own, manifest, seed, 1)]
    for name, beside in data.beside.items():
        settings = {"train": beside.path, "fields": beside.fields, "image": beside.image or data.image}
        # With the same seed, data sets of the same sizes would meet in the same pairs in every epoch.
        part, chance = open_beside(name, beside), _seed_of(seed, name)
        wanted.append((f"{name}_", own.model_copy(update=settings), part, chance, beside.ratio))
    sets = [
        _open_set(*each, TrainReading(_order(*each[1:4], global_batch * each[4]), micro_batch * each[4], rank, world))
        for each in wanted
    ]
    return TrainStream(
        sets, sets[0].reading, workers=data.workers, max_bad=data.max_bad, receive=_receive(data, sets, device)
    )


def _open_set(prefix: str, data: Data, manifest: Manifest, seed: int, ratio: int, reading: TrainReading) -> _Set:
    """One data set, after a look at the sizes of its shards."""
    for part in read_sets(manifest):
        for shard in part.shards[reading.rank :: reading.world]:
            check_shard(part, shard)
    assembler = Assembler(manifest, data, seed, reading)
    decoder = ImageDecoder(data.image, assembler.chance.seed) if "image" in data.fields else None
    return _Set(prefix, assembler, reading, manifest, decoder, ratio)


def _receive(data: Data, sets: Sequence[_Set], device: torch.device) -> Receive | None:
    """What makes batches for a device of what loaders write; None: nothing needs to be done."""
    if data.decode == "device":
        bases = itertools.accumulate((s.reading.order.samples for s in sets), initial=0)
        images = {
            s.prefix: Encoded(s.decoder, base, s.assembler.chance)
            for s, base in zip(sets, bases, strict=False)
            if s.decoder
        }
        return DeviceImages(images, device)
    return pinned if device.type == "cuda" else None


def _seed_of(seed: int, name: str) -> int:
    """A seed for a data set beside the first."""
    digest = hashlib.blake2b(name.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") >> 1


def _order(data: Data, manifest: Manifest, seed: int, global_batch: int) -> Order | Mixture:
    """The order of one source, or of several."""
    mixed = () if isinstance(data.train, str) else data.train
    orders: list[Order] = []
    parts = sources(manifest)
    for part, share in zip(parts, shares(global_batch, [s.weight for s in mixed] or [1.0]), strict=True):
        if share > part.samples and data.tail == "drop":
            raise ConfigError(
                f"run.global_batch = {global_batch} takes {share} samples of {part.root}, which has {part.samples}; "
                'take a smaller batch, or data.tail = "endless", which repeats them'
            )
        lanes = data.lanes or default_lanes(share, len(part.shards), part.samples)
        if lanes > part.samples:
            raise ConfigError(f"data.lanes = {lanes} is more than the {part.samples} samples of {part.root}")
        if share % lanes:
            raise ConfigError(f"data.lanes = {lanes} does not divide the {share} samples of a batch from {part.root}")
        orders.append(Order(np.array(part.starts, np.int64), seed, share, lanes, data.window, data.tail))
    return orders[0] if len(orders) == 1 else Mixture(tuple(orders))
