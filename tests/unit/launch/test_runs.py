"""`sluice runs` and `sluice note`, on folders that runs' own writers have made."""

from __future__ import annotations

import builtins
import io
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from launch import cli, history, runs, status
from launch.history import Submitted
from launch.runs import Wanted
from pipeline.core.errors import LaunchError
from tests.unit.launch.many_runs import make_run

ROOT = Path(__file__).parents[3]


@pytest.fixture
def sluice(monkeypatch, capsys, tmp_path):
    """Exit code, output and messages of a command, in a folder with some runs."""
    for lr in (1e-4, 1e-3):
        for seed in (0, 1):
            make_run(tmp_path / "runs" / "lr" / f"lr={lr:g},seed={seed}", lr=lr, seed=seed)
    make_run(tmp_path / "runs" / "nan", lr=1e-2, outcome="failed", error="loss is nan")
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, list[list[str]], str]:
        monkeypatch.setattr(sys, "argv", ["sluice", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), [line.split() for line in out.splitlines()], err

    return run


def names(lines: list[list[str]]) -> list[str]:
    return [line[0].removeprefix("runs/") for line in lines[1:-1]]


def test_all_below_runs(sluice):
    code, lines, _ = sluice("runs")
    assert code == 0 and lines[0] == ["run", "state", "step", "loss", "images/s", "knn/top1", "linear_probe/top1"]
    assert " ".join(lines[1]) == "runs/lr/lr=0.0001,seed=0 finished 300 0.25 2000 0.750 +- 0.010 0.750 +- 0.010"
    assert " ".join(lines[5]) == "runs/nan failed 100/300 0.75 2000 - - loss is nan" and lines[6][0] == "5"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["runs/lr"], ["lr/lr=0.0001,seed=0", "lr/lr=0.0001,seed=1", "lr/lr=0.001,seed=0", "lr/lr=0.001,seed=1"]),
        (["runs/*/*seed=1"], ["lr/lr=0.0001,seed=1", "lr/lr=0.001,seed=1"]),
        (["runs/nan", "runs/lr/*1,seed=0"], ["nan", "lr/lr=0.0001,seed=0", "lr/lr=0.001,seed=0"]),
        (["--where", "optimizer.lr > 1e-4", "--sort", "knn/top1"], ["lr/lr=0.001,seed=1", "lr/lr=0.001,seed=0", "nan"]),
        (["--where", "state == 'failed'"], ["nan"]),
        (["--where", "run.seed == 1 and knn/top1 < 0.8"], ["lr/lr=0.0001,seed=1"]),
        (["--sort", "-loss", "runs/*/*seed=1"], ["lr/lr=0.0001,seed=1", "lr/lr=0.001,seed=1"]),
        (["--seeds", "runs/lr"], ["lr/lr=0.0001", "lr/lr=0.001"]),
    ],
)
def test_which_and_in_which_order(sluice, words, wanted):
    code, lines, err = sluice("runs", *words)
    assert code == 0, err
    assert names(lines) == wanted


def test_seeds_in_one_line(sluice):
    """Two values a and b: their mean is (a + b) / 2 and its standard error |a - b| / 2."""
    _, lines, _ = sluice("runs", "runs/lr", "--seeds", "--show", "optimizer.lr")
    means = "0.1950 +- 0.0050 2000.50 +- 0.50 0.8050 +- 0.0050 0.8050 +- 0.0050"
    assert " ".join(lines[2]) == f"runs/lr/lr=0.001 2 finished 300 {means} 0.001"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere*"], "nowhere* names no run folder"),
        (["--where", "optimizer.lrr > 1"], "did you mean 'optimizer.lr'?"),
        (["--where", "optimizer.lr >"], "is written like"),
        (["--sort", "knn/top2"], "did you mean 'knn/top1'?"),
        (["--show", "objective.mask"], "no run has 'objective.mask'"),
    ],
)
def test_mistakes_are_one_message(sluice, words, message):
    code, _, err = sluice("runs", *words)
    assert code == 2 and message in err and "Traceback" not in err


def test_notes_and_tags(sluice):
    assert sluice("note", "runs/nan", "spike at 700", "--tag", "bad", "--tag", "look")[0] == 0
    assert sluice("note", "runs/nan", "--untag", "look")[0] == 0
    assert sluice("note", "runs/nan")[1] == [["runs/nan:", "tags", "bad"], ["spike", "at", "700"]]
    assert names(sluice("runs", "--where", "'bad' in tags")[1]) == ["nan"]
    assert "tags" in sluice("runs", "runs/nan")[1][0]
    for words, message in ((["runs/nan", "--tag", "a b"], "one word"), (["runs", "x"], "is no run folder")):
        code, _, err = sluice("note", *words)
        assert code == 2 and message in err


def test_what_is_queued_or_has_died_is_told(sluice, tmp_path, monkeypatch):
    queued = tmp_path / "runs" / "queued"
    history.append(queued, Submitted("t", "7", "c", 1, None, "x.toml", ["submit"], run=str(queued)))
    make_run(tmp_path / "runs" / "gone", outcome="running")
    os.utime(tmp_path / "runs" / "gone" / "state.json")
    monkeypatch.setattr(status, "SILENT_SECONDS", -1.0)
    monkeypatch.setattr(status.shutil, "which", lambda name: name)
    monkeypatch.setattr(status.slurm, "states", lambda jobs: {"7": "PENDING"} if "7" in jobs else {})
    lines = sluice("runs", "runs/queued", "runs/gone")[1]
    assert lines[1][:2] == ["runs/queued", "queued"] and "SLURM job 7 is pending" in " ".join(lines[1])
    assert lines[2][:2] == ["runs/gone", "died"]


def test_a_folder_named_like_a_pattern_is_itself(tmp_path):
    make_run(tmp_path / "betas=[0.9]")
    assert runs.find([str(tmp_path / "betas=[0.9]")]) == [tmp_path / "betas=[0.9]"]
    with pytest.raises(LaunchError, match="names no run"):
        runs.find([str(tmp_path / "betas=[0.8]")])


def test_work_grows_with_runs_by_a_few_small_files_each(tmp_path, monkeypatch):
    """What a thousand runs cost is files opened: the same few of each, and configurations only where asked for."""
    for number in range(6):
        make_run(tmp_path / f"{number}", seed=number)
        (tmp_path / f"{number}" / "checkpoints" / "step-00000300").mkdir(parents=True)
    opened: Counter[str] = Counter()
    real = io.open

    def counting(file, *args, **kwargs):
        opened[os.path.basename(file)] += 1
        return real(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", counting)
    monkeypatch.setattr(io, "open", counting)
    found = runs.choose(runs.find([str(tmp_path)]), Wanted())
    assert len(found) == 6 and found[0].measured["knn/top1"] == pytest.approx(0.8)
    plain = sum(opened.values())
    assert opened["state.json"] == 6 and "config.toml" not in opened and plain == 6 * (5 + 2)  # two results
    runs.choose(runs.find([str(tmp_path)]), Wanted(where="optimizer.lr > 0", sort="knn/top1"))
    assert opened["config.toml"] == 6 and sum(opened.values()) == 2 * plain + 6


def test_no_framework_is_imported(tmp_path):
    make_run(tmp_path / "a")
    code = (
        "import sys; sys.argv = ['sluice', 'runs', sys.argv[1], '--where', 'optimizer.lr > 0']\n"
        "from launch.cli import app\n"
        "app(standalone_mode=False)\n"
        "print('HEAVY', sorted({'torch', 'numpy', 'timm', 'PIL', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("HEAVY []\n"), done.stdout + done.stderr
