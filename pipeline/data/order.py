"""The order of samples: a pure function of (shard sizes, seed, global batch, lanes, window, position).

Per epoch the shards are permuted and laid end to end. The line is cut into L equal lanes; inside a lane a keyed
bijection shuffles windows of a few shards. Global batch t takes the same number of samples from every lane, lane after
lane, and a rank takes a run of them. So nothing here knows of ranks or workers, any position is found without walking
to it, and no array is longer than the number of shards.

Shape letters: S shards, L lanes, G samples of a global batch, Q positions asked for.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_ROUND_KEYS = tuple(np.uint64(r * 0x9E3779B97F4A7C15 % 2**64) for r in range(10))
# Fewer than eight rounds are measurably uneven on ranges of 5 to 13.
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))


def mix(x: Words) -> Words:
    """A bijection of 64-bit words that scatters its input (splitmix64; Steele, Lea and Flood, OOPSLA 2014)."""
    z = x + _GAMMA
    for shift, factor in _MIX:
        z = (z ^ (z >> shift)) * factor
    return z ^ (z >> np.uint64(31))


def shuffle(x: Ints, n: Ints, key: Words) -> Ints:
    """A keyed bijection of {0, ..., n-1}, elementwise: O(1) access to a shuffled range.

    A Feistel network on Z_a x Z_b with a*b just above n, and cycle walking for the few values that leave the range
    (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).

    Args:
        x: int64[Q], 0 <= x < n.
        n: int64[Q].
        key: uint64[Q].
    """
    a = np.ceil(np.sqrt(n)).astype(np.int64)
    b = -(-n // a)
    keys = [mix(key + r) for r in _ROUND_KEYS]
    result = x.copy()
    walking = np.arange(len(x))
    while len(walking):
        left, right = np.divmod(result[walking], b[walking])
        for r in range(len(keys)):
            source, size = (right, a) if r % 2 == 0 else (left, b)
            turn = (mix(source.astype(np.uint64) ^ keys[r][walking]) >> np.uint64(16)).astype(np.int64) % size[walking]
            if r % 2 == 0:
                left = (left + turn) % a[walking]
            else:
                right = (right + turn) % b[walking]
        result[walking] = left * b[walking] + right
        walking = walking[result[walking] >= n[walking]]
    return result


def default_lanes(global_batch: int, shards: int, samples: int) -> int:
    """The most lanes that still hold a whole shard each: the largest divisor of the global batch up to ``shards``, and
    where shards are empty or chosen from up to ``samples``, since no lane may be empty.
    """
    most = min(global_batch, max(shards, 1), samples)
    return max(d for d in range(1, most + 1) if global_batch % d == 0)


class Draw(NamedTuple):
    """Samples that were drawn. All of shape [Q]."""

    epoch: Ints
    """The epoch that delivers the sample."""
    id: Ints
    """The sample's number in the manifest."""


class _Epoch(NamedTuple):
    """One epoch's line of shards."""

    key: np.uint64
    shard: Ints
    """int64[S], the manifest's shard in each slot of the line."""
    line: Ints
    """int64[S+1], where each slot begins, and the end."""


@dataclass(frozen=True)
class Order:
    """The order of all epochs.

    Args:
        starts: int64[S+1], id of each shard's first sample, and the total.
        seed: seed of the run.
        global_batch: samples per step, over all ranks; in mode "drop" at most the total.
        lanes: divides ``global_batch``; at most the total.
        window: shards of a lane that are shuffled together.
        tail: "drop" leaves out the last (total mod global_batch) samples of an epoch, others each epoch; "endless"
            lets each lane roll over into the next epoch.
    """

    starts: Ints
    seed: int
    global_batch: int
    lanes: int
    window: int
    tail: Literal["drop", "endless"]
    _epochs: dict[int, _Epoch] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert self.global_batch % self.lanes == 0, (self.global_batch, self.lanes)
        assert 1 <= self.lanes <= self.samples, (self.lanes, self.samples)
        assert self.tail == "endless" or self.global_batch <= self.samples, (self.global_batch, self.samples)

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return int(self.starts[-1])

    @property
    def steps_per_epoch(self) -> float:
        """Global batches in a pass over the data; a whole number in mode "drop"."""
        exact = self.samples / self.global_batch
        return float(self.samples // self.global_batch) if self.tail == "drop" else exact

    @property
    def identity(self) -> dict[str, Any]:
        """All that fixes the order, beside the data."""
        fixed = ("seed", "global_batch", "lanes", "window", "tail")
        return {name: getattr(self, name) for name in fixed}

    def batch(self, step: int, first: int, last: int) -> Draw:
        """The samples ``first`` to ``last`` (exclusive) of the global batch of ``step``, which is lane-major."""
        per_lane = self.global_batch // self.lanes
        lane, offset = np.divmod(np.arange(first, last), per_lane)
        if self.tail == "drop":
            epoch, step = divmod(step, self.samples // self.global_batch)
            epochs, position = np.full(len(lane), epoch), step * per_lane + offset
        else:
            begin, end = self._bounds(lane)
            epochs, position = np.divmod(step * per_lane + offset, end - begin)
        ids = np.empty_like(lane)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            ids[chosen] = self._lookup(int(epoch), lane[chosen], position[chosen])
        return Draw(epochs, ids)

    def substitute(self, step: int, index: int, attempt: int) -> int | None:
        """The sample that stands in when sample ``index`` of the global batch cannot be read, and its next ones.

        It is the ``attempt``-th (from 1) after it on the line of shards, inside the same window of the same lane, so
        that the order of all others stays; None when the window holds no more.
        """
        drawn = self.batch(step, index, index + 1)
        epoch = self._epoch(int(drawn.epoch[0]))
        lane = np.array([index // (self.global_batch // self.lanes)])
        shard = np.searchsorted(self.starts, drawn.id, "right") - 1
        at = np.flatnonzero(epoch.shard == shard)
        begin, end, _ = self._window(epoch, lane, epoch.line[at] + drawn.id - self.starts[shard])
        size = end - begin
        if attempt >= size[0]:
            return None
        line = begin + (epoch.line[at] + drawn.id - self.starts[shard] - begin + attempt) % size
        return int(self._ids(epoch, line)[0])

    def windows(self, step: int) -> tuple[Ints, Ints]:
        """For each lane int64[L], the slots of the line whose windows a step of epoch 0 reads: first, one after last.

        Args:
            step: of a lane that does not roll over in it.
        """
        lane, share = np.arange(self.lanes), self.global_batch // self.lanes
        begin = self._bounds(lane)[0]
        epoch = self._epoch(0)
        low = self._window(epoch, lane, begin + step * share)[0]
        high = self._window(epoch, lane, begin + (step + 1) * share - 1)[1]
        return np.searchsorted(epoch.line, low, "right") - 1, np.searchsorted(epoch.line, high - 1, "right")

    def slots(self, epoch: int) -> tuple[Ints, Ints]:
        """For each lane int64[L], the slots of the line that it covers: first, one after last."""
        begin, end = self._bounds(np.arange(self.lanes))
        line = self._epoch(epoch).line
        return np.searchsorted(line, begin, "right") - 1, np.searchsorted(line, end - 1, "right")

    def _bounds(self, lane: Ints) -> tuple[Ints, Ints]:
        """Where lanes begin and end on the line."""
        return lane * self.samples // self.lanes, (lane + 1) * self.samples // self.lanes

    def _epoch(self, epoch: int) -> _Epoch:
        """The line of one epoch; the last two are kept."""
        if epoch not in self._epochs:
            text = f"order:{self.seed}:{epoch}".encode()
            key = np.frombuffer(hashlib.blake2b(text, digest_size=8).digest(), np.uint64)
            sizes = np.diff(self.starts)
            # The words are all different, since mix is a bijection, so that any sorting gives the same order.
            shard = np.argsort(mix(np.arange(len(sizes), dtype=np.uint64) ^ mix(key)))
            line = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[shard])])
            while len(self._epochs) >= 2:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = _Epoch(key[0], shard, line)
        return self._epochs[epoch]

    def _window(self, epoch: _Epoch, lane: Ints, point: Ints) -> tuple[Ints, Ints, Ints]:
        """Begin and end of the window around each point of the line, and its number in the lane."""
        begin, end = self._bounds(lane)
        first = np.searchsorted(epoch.line, begin, "right") - 1
        number = (np.searchsorted(epoch.line, point, "right") - 1 - first) // self.window
        low = first + number * self.window
        high = np.minimum(low + self.window, len(epoch.shard))
        return np.maximum(begin, epoch.line[low]), np.minimum(end, epoch.line[high]), number

    def _ids(self, epoch: _Epoch, line: Ints) -> Ints:
        """Numbers in the manifest of points on the line."""
        at = np.searchsorted(epoch.line, line, "right") - 1
        return self.starts[epoch.shard[at]] + line - epoch.line[at]

    def _lookup(self, number: int, lane: Ints, position: Ints) -> Ints:
        """Ids at positions of lanes, in one epoch."""
        epoch = self._epoch(number)
        point = self._bounds(lane)[0] + position
        begin, end, window = self._window(epoch, lane, point)
        key = mix(mix(lane.astype(np.uint64) + epoch.key) + window.astype(np.uint64))
        return self._ids(epoch, begin + shuffle(point - begin, end - begin, key))
