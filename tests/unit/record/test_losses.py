"""What is kept of samples' losses, and which of them are worst, forgotten, late: by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from launch.losses import show
from pipeline.core.errors import ConfigError, DataError
from pipeline.record.losses import History, LossFiles

NAN = float("nan")
LOSSES = np.array(
    [  # sample 0     1    2     3    4    5
        [9.0, 5.0, 1.0, 4.0, NAN, NAN],
        [9.0, 1.0, 8.0, 0.5, 7.0, NAN],
        [8.0, 1.5, 2.0, NAN, 0.7, NAN],
    ],
    np.float32,
)


def kept(folder: Path, sets=(("a", 6, None),), losses=LOSSES) -> Path:
    files = LossFiles(folder, losses.shape[1])
    files.describe(sets)
    for epoch, row in enumerate(losses):
        ids = np.flatnonzero(~np.isnan(row))[::-1]
        files.write(np.full(len(ids), epoch), ids, row[ids])
    files.flush()
    return folder


def test_what_was_written_is_read(tmp_path):
    history = History(kept(tmp_path))
    np.testing.assert_array_equal(history.losses, LOSSES)
    np.testing.assert_array_equal(history.last(), np.array([8.0, 1.5, 2.0, 0.5, 0.7, NAN], np.float32))


def test_orders(tmp_path):
    history = History(kept(tmp_path))
    assert history.order("worst").tolist() == [0, 2, 1, 4, 3]
    # last above least: 2.0 - 1.0 of sample 2, 1.5 - 1.0 of sample 1; 4 and 3 only fell, so did 0
    assert history.order("forgotten").tolist() == [2, 1]
    # the median of the last losses is 1.5: below it from epoch 1 on is 3 alone, from 2 on 4; never are 0, 2, 1
    assert history.order("late").tolist() == [0, 2, 1, 4, 3]


def test_written_again_it_is_the_newer(tmp_path):
    files = LossFiles(kept(tmp_path), 6)
    files.write(np.array([1, 0]), np.array([4, 4]), np.array([3.0, 2.0], np.float32))
    files.flush()
    expected = LOSSES.copy()
    expected[1, 4], expected[0, 4] = 3.0, 2.0
    np.testing.assert_array_equal(History(tmp_path).losses, expected)


def test_numbers_are_those_of_the_whole_data_set(tmp_path):
    kept(tmp_path, [("a", 2, None), ("b", 4, np.array([10, 30, 50, 70]))])
    listed = History(tmp_path).listed([1, 2, 5])
    assert [(s.where, s.number) for s in listed] == [("a", 1), ("b", 10), ("b", 70)]
    text = show(tmp_path, "worst", 3, tmp_path / "out", others=False, source="b")
    assert (tmp_path / "out").read_text() == "10\n"
    assert [line.split()[:2] for line in text.splitlines()[1:4]] == [["0", "a"], ["10", "b"], ["1", "a"]]
    show(tmp_path, "worst", 3, tmp_path / "out", others=True, source="b")
    assert (tmp_path / "out").read_text() == "30\n50\n70\n"
    with pytest.raises(ConfigError, match=r"several data sets; name one of them: --source PATH \(a, b\)"):
        show(tmp_path, "worst", 3, tmp_path / "out", others=True, source=None)
    with pytest.raises(ConfigError, match="was not trained on c, but on a, b"):
        show(tmp_path, "worst", 3, tmp_path / "out", others=True, source="c")


def test_what_is_not_there_or_damaged_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r'train with record\.losses = "every epoch"'):
        History(tmp_path)
    kept(tmp_path)
    (tmp_path / "losses" / "epoch-00001.npy").write_bytes(b"nothing")
    with pytest.raises(DataError, match="is damaged"):
        History(tmp_path)
