"""What has failed is said until it ends well, in every report."""

import json

from pipeline.core.evaluation import Number
from pipeline.record.board import board
from pipeline.record.failed import Ended, keep_failures, read_failures
from pipeline.record.outputs import keep
from pipeline.record.report import write_report
from pipeline.record.results import Origin, read_results, read_together
from pipeline.run.__main__ import main
from tests.unit.record.test_report import Page

EVIL = "stream 'val' has no <b>labels</b>\nname one & go on"


def test_a_failure_stays_until_the_same_one_ends_well(tmp_path):
    assert read_failures(tmp_path) == ()
    keep_failures(tmp_path, [Ended("knn on cifar", "step 10", EVIL), Ended("knn on cifar", "step 20", "late")])
    keep_failures(tmp_path, [Ended("rank", "step 10", None), Ended("knn on cifar", "step 20", "again")])
    first, second = sorted(read_failures(tmp_path), key=lambda one: one.model)
    assert (first.task, first.model, first.text) == ("knn on cifar", "step 10", EVIL) and first.time.endswith("+00:00")
    assert (second.model, second.text) == ("step 20", "again")
    keep_failures(tmp_path, [Ended("knn on cifar", "step 10", None)])
    assert [one.model for one in read_failures(tmp_path)] == ["step 20"]
    for text in ("{", "[]", '{"task": 1}'):
        (tmp_path / "results" / "damaged.failed").write_text(text)
        assert [one.model for one in read_failures(tmp_path)] == ["step 20"]


def test_one_that_fails_is_told_beside_one_of_the_same_name_that_ends_well(tmp_path):
    """The same evaluation with other settings, in one suite: whichever comes first."""
    keep_failures(tmp_path, [Ended("knn", "step 10", "why"), Ended("knn", "step 10", None)])
    assert [one.text for one in read_failures(tmp_path)] == ["why"]
    keep_failures(tmp_path, [Ended("knn", "step 10", None), Ended("knn", "step 10", None)])
    assert read_failures(tmp_path) == ()


def test_a_record_is_none_of_a_failure(tmp_path):
    keep_failures(tmp_path, [Ended("knn", "step 10", "why")])
    assert read_results(tmp_path).damaged == () and read_results(tmp_path).rows == []
    keep(tmp_path, [Number("knn/top1", 0.5, 9, "val")], Origin("step 10", 10, "w", "knn", {}, {"test": "m"}))
    assert len(read_failures(tmp_path)) == 1  # another's record does not take it away


def test_reports_say_what_failed(tmp_path, capsys):
    run = tmp_path / "mae"
    keep(run, [Number("knn/top1", 0.5, 9, "val")], Origin("step 10", 10, "w", "knn", {}, {"test": "m"}))
    keep_failures(run, [Ended("zero_shot on cifar", "step 10", EVIL)])
    for html in (write_report(run).read_text(), board([str(run)])):
        shown = Page(html)
        assert "1 evaluation failed" in shown.words and '<details class="failures" open>' in html
        assert "stream 'val' has no <b>labels</b> name one & go on" in shown.words and "step 10, 20" in shown.words
    assert read_together([str(run)]).failed[0].model == "mae: step 10"
    assert main(["report", "--run", str(run), "--format", "text"]) == 0
    assert "failed: zero_shot on cifar, step 10: stream 'val' has no <b>labels</b>" in capsys.readouterr().out
    assert main(["report", "--run", str(run), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["failed"][0]["text"] == EVIL
    keep_failures(run, [Ended(f"task {number}", "step 10", "why") for number in range(9)])
    assert '<details class="failures"><summary>10 evaluations failed' in board([str(run)])  # many are folded


def test_a_run_of_which_all_failed_says_so(tmp_path):
    (tmp_path / "config.toml").write_text("")
    keep_failures(tmp_path, [Ended("knn", "step 10", "no labels")])
    words = Page(write_report(tmp_path).read_text()).words
    assert "no labels" in words and "No evaluation was run yet" not in words
