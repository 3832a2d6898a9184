"""The order against a transcription in plain python, and its promises over awkward data sets."""

import hashlib
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipeline.data.order import Order, default_lanes, mix, shuffle
from pipeline.data.reading import TrainReading

AWKWARD = {
    "even": [8] * 6,
    "uneven": [3, 17, 5, 1, 29, 11],
    "one sample each": [1] * 40,
    "one shard": [50],
    "empty shards": [0, 20, 0, 0, 30, 0],
}


def order(sizes, *, seed=1, batch=8, lanes=4, window=2, tail="drop"):
    return Order(np.cumsum([0, *sizes]), seed, batch, lanes, window, tail)


def plain_mix(x):
    z = (x + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def plain_shuffle(x, n, key):
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    while True:
        left, right = divmod(x, b)
        for r in range(10):
            round_key = plain_mix((key + r * 0x9E3779B97F4A7C15) % 2**64)
            turn = plain_mix((right if r % 2 == 0 else left) ^ round_key) >> 16
            if r % 2 == 0:
                left = (left + turn) % a
            else:
                right = (right + turn) % b
        x = left * b + right
        if x < n:
            return x


def plain_lanes(sizes, seed, epoch, lanes, window):
    """All lanes of an epoch as lists of ids, by building every list in full."""
    key = int.from_bytes(hashlib.blake2b(f"order:{seed}:{epoch}".encode(), digest_size=8).digest(), "little")
    shards = sorted(range(len(sizes)), key=lambda s: plain_mix(s ^ plain_mix(key)))
    starts = list(itertools.accumulate(sizes, initial=0))
    line = [starts[s] + i for s in shards for i in range(sizes[s])]
    shard_at = [place for place, s in enumerate(shards) for _ in range(sizes[s])]
    result = []
    for lane in range(lanes):
        begin, end = lane * len(line) // lanes, (lane + 1) * len(line) // lanes
        places = range(begin, end)
        ids = []
        groups = itertools.groupby(places, key=lambda p: (shard_at[p] - shard_at[begin]) // window)
        for number, group in groups:
            block = list(group)
            window_key = plain_mix((plain_mix((lane + key) % 2**64) + number) % 2**64)
            ids += [line[block[plain_shuffle(i, len(block), window_key)]] for i in range(len(block))]
        result.append(ids)
    return result


def plain_steps(sizes, seed, batch, lanes, window, tail, steps):
    """(epoch, id) of each global batch, by walking every lane from its beginning."""
    share = batch // lanes
    whole = sum(sizes) // batch
    walks = []
    for lane in range(lanes):
        walk, epoch = [], 0
        while len(walk) < steps * share:
            ids = plain_lanes(sizes, seed, epoch, lanes, window)[lane]
            walk += [(epoch, i) for i in (ids[: whole * share] if tail == "drop" else ids)]
            epoch += 1
        walks.append(walk)
    return [[pair for walk in walks for pair in walk[t * share : (t + 1) * share]] for t in range(steps)]


@pytest.mark.parametrize("tail", ["drop", "endless"])
@pytest.mark.parametrize("lanes", [1, 2, 8])
@pytest.mark.parametrize("sizes", AWKWARD.values(), ids=AWKWARD)
def test_equals_plain_python(sizes, lanes, tail):
    steps = 3 * sum(sizes) // 8
    subject = order(sizes, lanes=lanes, tail=tail)
    expected = plain_steps(sizes, 1, 8, lanes, 2, tail, steps)
    for step in range(steps):
        place = subject.batch(step, 0, 8)
        assert list(zip(place.epoch.tolist(), place.id.tolist(), strict=True)) == expected[step]


GOLDEN_EPOCHS = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
GOLDEN_IDS = [170, 161, 59, 19, 243, 98, 261, 323, 346, 127]


def test_golden():
    """The order is part of a run's identity: it may not change between versions."""
    place = order([100, 50, 75, 125], seed=42, batch=10, lanes=5, tail="endless").batch(34, 0, 10)
    assert place.epoch.tolist() == GOLDEN_EPOCHS
    assert place.id.tolist() == GOLDEN_IDS


@pytest.mark.parametrize("sizes", AWKWARD.values(), ids=AWKWARD)
@pytest.mark.parametrize("lanes", [1, 4, 8])
def test_drop_delivers_each_sample_once_but_the_tail(sizes, lanes):
    subject = order(sizes, lanes=lanes)
    samples, steps = sum(sizes), int(subject.steps_per_epoch)
    missing = []
    for epoch in range(3):
        ids = np.concatenate([subject.batch(epoch * steps + t, 0, 8).id for t in range(steps)])
        assert len(np.unique(ids)) == len(ids) == samples - samples % 8
        missing.append(set(range(samples)) - set(ids.tolist()))
    assert not samples % 8 or len(set(map(frozenset, missing))) > 1, "always the same samples are dropped"


@pytest.mark.parametrize("sizes", AWKWARD.values(), ids=AWKWARD)
@pytest.mark.parametrize("lanes", [1, 4, 8])
def test_endless_delivers_each_sample_once_per_epoch(sizes, lanes):
    subject = order(sizes, lanes=lanes, tail="endless")
    samples = sum(sizes)
    places = [subject.batch(t, 0, 8) for t in range(4 * samples // 8)]
    epochs, ids = (np.concatenate(x) for x in zip(*places, strict=True))
    for epoch in range(3):
        assert sorted(ids[epochs == epoch]) == list(range(samples))


@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=12),
    batch=st.integers(1, 12),
    data=st.data(),
    window=st.integers(1, 5),
    tail=st.sampled_from(["drop", "endless"]),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_data_set(sizes, batch, data, window, tail, seed):
    samples = sum(sizes)
    if batch > samples:
        return
    lanes = data.draw(st.sampled_from([d for d in range(1, batch + 1) if batch % d == 0]))
    subject = order(sizes, seed=seed, batch=batch, lanes=lanes, window=window, tail=tail)
    steps = samples // batch
    places = [subject.batch(t, 0, batch) for t in range(steps)]
    ids = np.concatenate([p.id for p in places])
    assert len(np.unique(ids)) == len(ids)
    assert all((p.epoch == 0).all() for p in places)
    assert ids.min() >= 0 and ids.max() < samples


@pytest.mark.parametrize("tail", ["drop", "endless"])
@pytest.mark.parametrize(("world", "micro"), [(1, 48), (1, 3), (2, 24), (3, 4), (4, 12), (8, 2), (16, 3), (16, 1)])
def test_global_batches_do_not_depend_on_the_world_size(world, micro, tail):
    """Sixteen ranks are more than the shards here."""
    subject = order([13, 40, 1, 0, 70, 9], batch=48, lanes=12, tail=tail)
    for step in (0, 1, 5):
        plans = [TrainReading(subject, micro, rank, world) for rank in range(world)]
        numbers = [step * plan.accumulation + m for plan in plans[:1] for m in range(plan.accumulation)]
        parts = [plan.draw(number).id for plan in plans for number in numbers]
        assert np.concatenate(parts).tolist() == subject.batch(step, 0, 48).id.tolist()
        assert all(plan.step(number) == step for plan in plans for number in numbers)


def test_epochs_seeds_and_lanes_differ():
    subject = order([50] * 8, batch=40, lanes=4)
    batches = [subject.batch(t, 0, 40).id.tolist() for t in (0, 10, 20)]
    batches.append(order([50] * 8, batch=40, lanes=4, seed=2).batch(0, 0, 40).id.tolist())
    assert len({tuple(b) for b in batches}) == 4


def test_substitutes_are_the_rest_of_the_window():
    subject = order([7, 5, 9, 4, 11, 2], batch=6, lanes=2, window=2)
    lanes = plain_lanes([7, 5, 9, 4, 11, 2], 1, 0, 2, 2)
    for index in (0, 4):
        bad = int(subject.batch(2, index, index + 1).id[0])
        found = [subject.substitute(2, index, attempt) for attempt in range(1, 40)]
        others = found[: found.index(None)]
        assert set(found[len(others) :]) == {None}
        assert bad not in others and len(set(others)) == len(others) > 0
        assert set(others) <= set(lanes[index // 3])
        # The window that holds the bad sample is a run of its lane, so its members are neighbours there.
        at = sorted(lanes[index // 3].index(i) for i in [bad, *others])
        assert at == list(range(at[0], at[0] + len(at)))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 30, 31, 1000])
def test_shuffle_is_a_bijection(n):
    for key in range(5):
        result = shuffle(np.arange(n), np.full(n, n), np.full(n, key, np.uint64))
        assert sorted(result) == list(range(n))


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_shuffle_gives_all_permutations_equally(n):
    keys = 6000
    key = mix(np.repeat(np.arange(keys, dtype=np.uint64), n))
    result = shuffle(np.tile(np.arange(n), keys), np.full(keys * n, n), key).reshape(keys, n)
    counts = np.unique(result, axis=0, return_counts=True)[1]
    assert len(counts) == math.factorial(n) and stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("n", [7, 8, 13, 30, 200])
def test_shuffle_leaves_no_trace_of_neighbours(n):
    keys = 200_000 // n
    key = mix(np.repeat(np.arange(keys, dtype=np.uint64), n))
    result = shuffle(np.tile(np.arange(n), keys), np.full(keys * n, n), key).reshape(keys, n)
    for first, second in ((0, 1), (0, n // 2), (n - 2, n - 1)):
        distance = np.bincount((result[:, first] - result[:, second]) % n, minlength=n)[1:]
        assert stats.chisquare(distance).pvalue > 1e-3
    assert min(stats.chisquare(np.bincount(column, minlength=n)).pvalue for column in result.T) > 1e-4 / n


@pytest.mark.parametrize(
    ("batch", "shards", "lanes"), [(4096, 1000, 512), (256, 8, 8), (48, 7, 6), (7, 3, 1), (64, 10**6, 64), (8, 0, 1)]
)
def test_default_lanes(batch, shards, lanes):
    assert default_lanes(batch, shards, 10**9) == lanes


def test_no_lane_is_empty_where_few_samples_are_chosen_from_many_shards():
    assert default_lanes(64, 12, 10) == 8


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_a_batch_larger_than_the_data_set_takes_samples_again_each_time_in_another_epoch(lanes):
    sizes = [2, 0, 3]
    subject = order(sizes, lanes=lanes, tail="endless")
    for step, expected in enumerate(plain_steps(sizes, 1, 8, lanes, 2, "endless", 10)):
        place = subject.batch(step, 0, 8)
        assert list(zip(place.epoch.tolist(), place.id.tolist(), strict=True)) == expected
        assert len(set(expected)) == 8
    with pytest.raises(AssertionError):
        order(sizes, lanes=lanes, tail="drop")


def test_a_billion_samples_need_no_long_array():
    """Only arrays with one entry per shard exist, whatever the number of samples."""
    starts = np.arange(0, 10**9 + 1, 10**6)
    subject = Order(starts, 0, 4096 * 64, 4096 * 64, 4, "drop")
    place = subject.batch(3000, 64 * 2047, 64 * 2048)
    assert len(np.unique(place.id)) == 64
    assert max(array.size for epoch in subject._epochs.values() for array in epoch[1:]) == 1001


def test_a_long_run_keeps_no_more_than_two_epochs():
    subject = order([5] * 8, tail="endless")
    for step in range(50):
        assert np.array_equal(subject.batch(step, 0, 8).id, order([5] * 8, tail="endless").batch(step, 0, 8).id)
    assert len(subject._epochs) == 2


def test_steps_of_an_epoch():
    """41 samples are five batches of eight and a rest, which mode "endless" does not lose."""
    assert order([41]).steps_per_epoch == 5 and order([41], tail="endless").steps_per_epoch == 5.125
