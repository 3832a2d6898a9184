import json
import logging
import math

import pytest

from pipeline.record.metrics import MetricsLog, read_history, read_metrics


def write(folder, *rows):
    log = MetricsLog(folder)
    for row in rows:
        log.append(row)
    log.close()


def test_lines_are_strict_json_in_the_order_given(tmp_path):
    row = {"step": 1, "loss": math.inf, "lr": 0.1, "data_digest": "00ff", "attempt": 0}
    write(tmp_path, row)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "loss": "Infinity", "lr": 0.1, "data_digest": "00ff", "attempt": 0}\n'
    assert read_metrics(tmp_path) == [row]


def test_values_read_back_are_those_written(tmp_path):
    write(tmp_path, {"step": 1, "a": math.nan, "b": -math.inf, "c": 0.1 + 0.2, "d": 2**60, "e": "NaN-like"})
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row.pop("a"))
    assert row == {"step": 1, "b": -math.inf, "c": 0.1 + 0.2, "d": 2**60, "e": "NaN-like"}


def test_a_resume_supersedes_what_it_repeats_and_deletes_nothing(tmp_path):
    write(tmp_path, *({"step": s, "attempt": 0} for s in (10, 20, 30, 40)))
    write(tmp_path, *({"step": s, "attempt": 1} for s in (30, 40, 50)))
    rows = [(r["step"], r["attempt"]) for r in read_metrics(tmp_path)]
    assert rows == [(10, 0), (20, 0), (30, 1), (40, 1), (50, 1)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 7


def test_a_resume_at_other_log_steps_drops_the_abandoned_ones(tmp_path):
    write(tmp_path, *({"step": s, "attempt": 0} for s in (10, 20, 30, 40)))
    write(tmp_path, *({"step": s, "attempt": 1} for s in (25, 50)))
    assert [r["step"] for r in read_metrics(tmp_path)] == [10, 20, 25, 50]


def test_two_resumes_to_ever_earlier_steps(tmp_path):
    for attempt, steps in enumerate([(1, 2, 3, 4), (3, 4), (2, 3)]):
        write(tmp_path, *({"step": s, "attempt": attempt} for s in steps))
    assert [(r["step"], r["attempt"]) for r in read_metrics(tmp_path)] == [(1, 0), (2, 2), (3, 2)]


def test_torn_lines_are_skipped_counted_and_told(tmp_path, caplog):
    write(tmp_path, {"step": 1})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    write(tmp_path, {"step": 2})
    assert read_history(tmp_path).torn == 1
    with caplog.at_level(logging.WARNING):
        assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]
    assert "skipped 1 torn line" in caplog.text


def test_a_run_that_has_not_logged_has_no_rows(tmp_path):
    assert read_metrics(tmp_path) == []


def test_a_line_needs_its_step(tmp_path):
    with pytest.raises(AssertionError):
        write(tmp_path, {"loss": 1.0})


def test_a_live_reader_sees_each_line_at_once(tmp_path):
    log = MetricsLog(tmp_path)
    log.append({"step": 1})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1}
    log.close()
