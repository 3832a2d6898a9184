"""What is asked for: where results go, what subjects are called, and what is there already."""

from __future__ import annotations

from pathlib import Path

from pipeline.core.evaluation import Number
from pipeline.dist.meeting import Failure
from pipeline.record.outputs import keep
from pipeline.record.records import About
from pipeline.record.results import Origin
from pipeline.suites.evaluate import _tell, _wanted
from pipeline.suites.running import Done, there
from pipeline.suites.subjects import find
from tests.unit.suites.test_subjects import make_run


def test_a_run_has_one_folder_however_it_is_spelled(tmp_path, monkeypatch):
    """A checkpoint is found by its whole path, an untrained model by the path that was typed."""
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/mae"), 3, 6)
    (tmp_path / "link").symlink_to(tmp_path / "runs/mae")
    words = ["runs/mae@all", "random:runs/mae", str(tmp_path / "runs/mae"), "random:link"]
    assert len({wanted.folder for wanted in _wanted(find(words), None, None)}) == 1


def test_of_several_runs_it_is_told_which_one_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in ("mae", "clip"):
        make_run(Path("runs") / run, 6)
    wanted = _wanted(find(["runs/*", "random:runs/mae"]), None, None)
    assert [(one.name, one.told(one.name)) for one in wanted] == [
        ("step 6", "clip: step 6"), ("step 6", "mae: step 6"), ("random init", "mae: random init"),
    ]  # fmt: skip
    assert [one.told(one.name) for one in _wanted(find(["runs/*"]), "out", None)] == ["clip: step 6", "mae: step 6"]


def test_weights_that_were_measured_under_another_name_are_told_of(tmp_path, capsys):
    def origin(model: str) -> Origin:
        return Origin(model, None, "w" * 32, "knn", {"k": [20]}, {"test": "m"})

    keep(tmp_path, [Number("knn/top1", 0.5, 9, "val")], origin("mae"), About(code="c"))
    assert there(tmp_path, origin("mae"), "c", "knn") is not None and capsys.readouterr().err == ""
    assert there(tmp_path, origin("copy of mae"), "c", "knn") is not None
    said = capsys.readouterr().err
    assert "knn, copy of mae: it has the weights of mae, under whose name its results are" in said
    assert there(tmp_path, origin("mae"), "d", "knn") is None and "by other code" in capsys.readouterr().err


def test_why_a_subject_fails_is_said_once_for_all_of_its_tasks(tmp_path, capsys):
    broken = Failure("runs/mae/checkpoints/step-00000006: it is damaged", "")
    done = [Done(title, "step 6", "mae: step 6", tmp_path, broken) for title in ("knn on cifar", "rank")]
    done += [Done("rank", "step 6", "clip: step 6", tmp_path, broken), Done("knn", "step 3", "mae: step 3", tmp_path)]
    _tell(done)
    assert capsys.readouterr().err.splitlines() == [
        "sluice: 3 of 4 evaluations have failed; what the others have measured is kept",
        f"  knn on cifar, rank, mae: step 6: {broken.text}",
        f"  rank, clip: step 6: {broken.text}",
    ]
