"""How far a suite is, on a clock that is turned by hand."""

from __future__ import annotations

import io

import torch

from pipeline.suites.progress import Progress, Shown
from tests.contracts.components import ListStream


def test_a_line_now_and_then_with_the_time_left():
    now, stream = [0.0], io.StringIO()
    progress = Progress(stream, 4, clock=lambda: now[0])
    progress.begin("knn")
    data = ListStream(torch.zeros(100, 1), torch.zeros(100, dtype=torch.int64), batch=10)
    for _ in Shown("val", data, 1, progress.show):
        now[0] += 2.0
    progress.end()
    progress.begin("there already")
    progress.end(worked=False)
    progress.begin("linear_probe")
    progress.show("made images", 50, 200)
    now[0] += 10.0
    progress.show("made images", 100, 200)
    first, *others = stream.getvalue().splitlines()
    assert first == "knn (1 of 4)"
    # two seconds for ten samples, measured from the tenth on
    assert others[0] == "knn (1 of 4): val, 30% of 100  14 s left"
    # one task has taken 20 s, so the one that is left will take as long
    assert others[-1] == "linear_probe (3 of 4): made images, 50% of 200  20 s left, 40 s for all"


def test_ranks_share_and_only_the_first_speaks():
    shown, stream = [], io.StringIO()
    data = ListStream(torch.zeros(103, 1), torch.zeros(103, dtype=torch.int64), 0, 4, batch=10)
    list(Shown("val", data, 4, lambda *seen: shown.append(seen)))
    assert shown == [("val", 40, 103), ("val", 80, 103), ("val", 103, 103)]
    quiet = Progress(stream, 1, quiet=True)
    quiet.begin("knn")
    quiet.show("val", 1, 2)
    assert stream.getvalue() == ""
