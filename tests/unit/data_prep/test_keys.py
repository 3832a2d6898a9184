"""Many keys: against Python's own sets and dictionaries."""

import signal
import threading
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st

from data_prep.ahead import in_order, processes
from data_prep.keys import Keys

SHARDS = st.lists(st.lists(st.sampled_from("abcdefghijklmnop") | st.text(max_size=3), max_size=6), max_size=5)


@given(SHARDS, st.text(max_size=2))
def test_repeated_keys_are_those_that_a_dictionary_finds(shards, other):
    keys, expected, first, asked = Keys(), [], {}, []
    for number, shard in enumerate(shards):
        keys.add(shard)
        for key in shard:
            if key in first:
                expected.append((key, first[key], number))
            first.setdefault(key, number)
    found = list(keys.repeated(lambda number: asked.append(number) or shards[number]))
    assert found == expected
    assert set(asked) == {n for _, *pair in expected for n in pair}, "others are not read again"
    assert (other in keys) == any(other in shard for shard in shards)


def test_every_key_is_found():
    """Digests that end in zero bytes too, which numpy's strings pass over."""
    keys = Keys()
    for shard in range(20):
        keys.add([f"{shard}/{i}" for i in range(200)])
    keys.sort()
    assert all(f"{shard}/{i}" in keys for shard in range(20) for i in range(200))
    assert not any(f"{shard}/{i}" in keys for shard in range(20, 30) for i in range(200))


def test_workers_leave_the_keyboard_to_their_parent():
    """Ctrl-C goes to all processes of a terminal: the parent stops the build, and needs its workers until then."""
    with processes(1, "data_prep.prepare") as pool:
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN


def test_work_is_a_few_ahead_and_in_order():
    begun, lock, used = [], threading.Lock(), 0

    def work(i):
        with lock:
            begun.append(i)
        return i * i

    with ThreadPoolExecutor(3) as pool:
        for i, result in in_order(pool, work, range(40), 5):
            assert (i, result) == (used, used**2)
            used += 1
            assert len(begun) <= used + 5
    assert used == 40
