"""Which ranks stay slow, on series made up here; and what is kept of it."""

from __future__ import annotations

import json
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.record.paces import (
    Paces,
    Slow,
    Stragglers,
    Window,
    as_text,
    others_median,
    read_paces,
    rows_of,
    slow_nodes,
)

NODES = ["n1", "n1", "n2", "n2"]


def window(*own: float, data: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0), seconds: float = 1.0, step: int = 9) -> Window:
    return Window(step, seconds, [(d, o, 0.0, 0.0) for d, o in zip(data, own, strict=True)])


EVEN = window(0.5, 0.5, 0.5, 0.5)


def told(*windows: Window, percent: float = 40.0, nodes: list[str] = NODES) -> tuple[Stragglers, list[list[str]]]:
    judge = Stragglers(nodes, percent)
    return judge, [judge.hear(w) for w in windows]


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=12))
def test_the_median_of_all_others(values):
    left_out = [statistics.median(values[:i] + values[i + 1 :]) for i in range(len(values))]
    assert others_median(values) == pytest.approx(left_out, rel=1e-12)


def test_a_rank_that_stays_slow_is_named_once_after_three_windows():
    slow = window(0.5, 0.5, 0.5, 0.75)  # half as much again
    judge, said = told(EVEN, slow, slow, slow, slow, slow)
    assert [len(texts) for texts in said] == [0, 0, 0, 1, 0, 0]
    assert said[3] == [
        'slow: rank 3 on n2 stays behind (50 % more than the median of the others), mostly in "step": '
        "0.75 s a step of its own, where they take 0.5 s"
    ]
    assert judge.named == {3: Slow(3, "n2", 50.0, "step", 9)}


def test_a_pause_that_passes_is_not_named():
    slow = window(0.5, 5.0, 0.5, 0.5)
    assert not any(told(*[slow, slow, EVEN] * 10)[1])


def test_what_it_is_slow_in_is_named():
    late = window(0.5, 0.5, 0.5, 0.55, data=(0.01, 0.01, 0.4, 0.01))
    judge, _ = told(late, late, late)
    assert [(s.rank, s.phase) for s in judge.named.values()] == [(2, "data")]
    assert judge.named[2].percent == pytest.approx(100 * (0.9 / 0.51 - 1))


@pytest.mark.parametrize(("own", "named"), [(0.699, []), (0.701, [0])])
def test_forty_percent_are_the_limit(own, named):
    slow = window(own, 0.5, 0.5, 0.5)
    assert list(told(slow, slow, slow)[0].named) == named


def test_what_nobody_feels_is_not_named():
    """Twice as slow, but that is 0.04 s of steps of 1 s: they are spent on communication."""
    slow = window(0.08, 0.04, 0.04, 0.04)
    assert not told(slow, slow, slow)[0].named
    slow = window(0.10, 0.04, 0.04, 0.04)
    assert list(told(slow, slow, slow)[0].named) == [0]


def test_what_is_done_between_steps_is_not_judged():
    logs = Window(9, 1.0, [(0.0, 0.5, 3.0, 3.0), *[(0.0, 0.5, 0.0, 0.0)] * 3])
    assert not told(logs, logs, logs)[0].named


def test_what_takes_long_between_steps_hides_nobody():
    evaluates = Window(9, 61.0, [(0.0, 0.5, 0.0, 60.0)] * 3 + [(0.0, 0.9, 0.0, 60.0)])
    assert list(told(evaluates, evaluates, evaluates)[0].named) == [3]


def test_one_of_two_ranks_and_a_node_of_two():
    pair = Window(9, 1.0, [(0.0, 0.5, 0.0, 0.0), (0.0, 0.9, 0.0, 0.0)])
    assert list(told(pair, pair, pair, nodes=["n1", "n2"])[0].named) == [1]
    node = window(0.5, 0.5, 0.9, 0.8)
    judge, said = told(node, node, node)
    assert list(judge.named) == [2, 3]
    assert len(said[2]) == 1 and "all 2 ranks of node n2 stay behind (80 % more" in said[2][0]
    alone = Window(9, 1.0, [(0.0, 0.5, 0.0, 0.0)])
    assert not told(alone, alone, alone, nodes=["n1"])[0].named


def test_one_that_has_recovered_is_named_no_more():
    slow = window(0.5, 0.5, 0.5, 0.9)
    judge, said = told(slow, slow, slow, EVEN, EVEN, slow, EVEN, EVEN, EVEN)
    assert [len(texts) for texts in said] == [0, 0, 1, 0, 0, 0, 0, 0, 1]
    assert said[-1] == ["rank 3 on n2 is no longer slower than the others"] and not judge.named


def test_ranks_that_differ_a_little_are_never_named():
    """Each is 30 % slower in its turn, and all are now and then twice as slow for a window."""
    judge = Stragglers(NODES, 40.0)
    for turn in range(40):
        own = [0.5, 0.5, 0.5, 0.5]
        own[turn // 10] = 0.65
        own[turn % 4] *= 2
        assert not judge.hear(window(*own))


def paces(slow: list[Slow]) -> Paces:
    own = [(0.01, 0.5, 0.0, 0.001), (0.01, 0.9, 0.0, 0.0), (0.6, 0.51, 0.0, 0.0), (0.01, 0.52, 0.123456, 0.0)]
    return Paces(3, 120, 1.1, NODES, own, slow)


def test_what_is_kept_is_read_again(tmp_path):
    assert read_paces(tmp_path) is None
    paces([Slow(1, "n1", 80.0, "step", 90)]).write(tmp_path)
    found = read_paces(tmp_path)
    assert found is not None and (found.attempt, found.step, found.nodes) == (3, 120, NODES)
    assert list(found.own[3]) == [0.01, 0.52, 0.1235, 0.0] and found.slow == [Slow(1, "n1", 80.0, "step", 90)]
    assert json.loads((tmp_path / "paces.json").read_text())["slow"][0]["node"] == "n1"
    (tmp_path / "paces.json").write_text('{"attempt": 3')
    assert read_paces(tmp_path) is None


def test_slow_nodes_are_those_of_this_attempt_the_slowest_first(tmp_path):
    paces([Slow(1, "n1", 50.0, "step", 90), Slow(2, "n2", 120.0, "data", 99)]).write(tmp_path)
    assert slow_nodes(tmp_path, 2) == slow_nodes(tmp_path, None) == {}
    found = slow_nodes(tmp_path, 3)
    assert list(found) == ["n2", "n1"] and found["n2"] == 'rank 2 is 120 % slower, mostly in "data"'


def test_the_table_has_the_slowest_first():
    shown = paces([Slow(2, "n2", 114.0, "data", 99)])
    assert [row[0] for row in rows_of(shown, 8)] == ["rank", "2", "1", "3", "0"]
    assert rows_of(shown, 8)[1] == ["2", "n2", "0.6", "0.51", "0", "0", 'slow in "data", +114 %']
    assert [(row[0], row[-1]) for row in rows_of(shown, 1)[2:]] == [("3", "in the middle of 4")]
    assert as_text(shown, 8)[2] == '  2     n2    0.6   0.51  0           0      slow in "data", +114 %'
