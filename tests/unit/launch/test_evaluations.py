"""`sluice submit SUITE SUBJECT...`: what each task of the array is told, and what is refused before it is queued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch import evaluations, history, slurm, status, submit
from launch.cli import app
from launch.evaluations import Order, submit_suite
from launch.history import Attempt, Submitted
from launch.job import Job
from pipeline.config import load
from pipeline.core.errors import ConfigError
from tests.unit.launch.test_submit import ROOT, write

SUITE = ROOT / "configs" / "eval" / "glyphs.toml"


@pytest.fixture
def queue(monkeypatch):
    """What was submitted, options and environment, numbered from 41; and what SLURM says of jobs."""
    made, known = [], {}

    def stand_in(options, script, environment):
        made.append((list(options), script.name, dict(environment)))
        return str(40 + len(made))

    monkeypatch.setattr(slurm, "submit", stand_in)
    monkeypatch.setattr(slurm, "states", lambda jobs: {job: known[job] for job in jobs if job in known})
    monkeypatch.setattr(status.shutil, "which", lambda command: command)
    monkeypatch.setattr(submit, "check_there", lambda draft, profile: None)
    return made, known


def run_of(folder: Path, *steps: int) -> Path:
    """A run's folder with checkpoints, of which nobody looks at more than the names."""
    folder.mkdir(parents=True)
    (folder / "config.toml").touch()
    for step in steps:
        place = folder / "checkpoints" / f"step-{step:08d}"
        place.mkdir(parents=True)
        (place / "checkpoint.json").write_text(json.dumps({"state": {"step": step}, "tensors": {"ema/x": 0}}))
    return folder


def told(environment: dict[str, str], number: int) -> Job:
    return Job.read(Path(environment["SLUICE_JOB"].replace("{task}", str(number))))


def test_a_task_for_each_subject_and_kind_of_weights(tmp_path, queue, monkeypatch):
    made, _ = queue
    monkeypatch.chdir(tmp_path)
    a, b = run_of(Path("a"), 3, 6), run_of(Path("b"), 9)
    cluster = write(tmp_path / "c.toml", gpus_per_node=4, memory_gb=64.0)
    order = Order(SUITE, ["a@all", "b"], ["batch=3"], ["model", "ema"], procs=2, cluster=str(cluster), at_once=3)
    said = submit_suite(order, dry_run=False)
    ((options, script, environment),) = made
    assert script == "evaluate.sbatch"
    share = {"--ntasks-per-node=2", "--gpus-per-node=2", f"--mem={32 * 1024}M"}
    assert share | {"--array=0-5%3", "--nodes=1", f"--chdir={tmp_path}"} <= set(options)
    jobs = [told(environment, number) for number in range(6)]
    copies = [Path(job.arguments[6]) for job in jobs]
    spelled = [
        *(str(tmp_path / a / "checkpoints" / f"step-0000000{n}") for n in (3, 3, 6, 6)),
        *[str(tmp_path / b)] * 2,
    ]
    for job, word, weights, copy in zip(jobs, spelled, ["model", "ema"] * 3, copies, strict=True):
        assert job.arguments == [
            "-m", "pipeline.run", "eval", "--run", word, "--suite", str(copy), "--weights", weights
        ]  # fmt: skip
        assert (job.kind, job.ranks_per_node) == ("evaluate", 2)
        assert copy.name == "glyphs.toml" and load.load_suite(copy).batch == 3  # by that name records know the suite
        (entry,) = history.read(Path(job.run))
        assert isinstance(entry, Submitted) and entry.command[:3] == ["submit", str(copy), word]
    assert len({job.run for job in jobs}) == 6 and jobs[-1].run.startswith(f"{tmp_path}/b/launch/eval-glyphs/")
    assert f"sluice report {tmp_path}/a {tmp_path}/b" in said


def test_what_is_not_of_a_run_needs_a_folder_and_keeps_its_name_there(tmp_path, queue, monkeypatch):
    made, _ = queue
    monkeypatch.chdir(tmp_path)
    for name in ("x/mae", "y/mae"):
        run_of(Path(name), 3)
    with pytest.raises(ConfigError, match="--out FOLDER"):
        submit_suite(Order(SUITE, ["random:vit_tiny_patch16_224"]), dry_run=False)
    order = Order(SUITE, ["x/mae", "y/mae@3", "random:vit_tiny_patch16_224", "random:x/mae"], out=Path("out"))
    submit_suite(order, dry_run=False)
    jobs = [told(made[0][2], number) for number in range(4)]
    out = ["--out", str(tmp_path / "out"), "--source"]
    assert jobs[0].arguments[7:] == ["--weights", "model", *out, "x/mae"]
    assert jobs[1].arguments[7:] == ["--weights", "model", *out, "y/mae"]
    assert jobs[2].arguments[4:5] + jobs[2].arguments[7:] == (
        ["random:vit_tiny_patch16_224", *out, "random:vit_tiny_patch16_224"]
    )
    assert jobs[3].arguments[4] == f"random:{tmp_path}/x/mae"


def test_what_is_queued_is_not_submitted_twice_and_what_failed_is(tmp_path, queue):
    made, known = queue
    runs = [str(run_of(tmp_path / name, 3)) for name in "ab"]
    submit_suite(Order(SUITE, runs), dry_run=False)
    known |= {"41_0": "RUNNING", "41_1": "PENDING"}
    assert submit_suite(Order(SUITE, runs), dry_run=False).endswith("nothing to submit")
    submit_suite(Order(SUITE, runs, ["batch=7"]), dry_run=False)  # another suite
    folder = Path(told(made[0][2], 1).run)
    history.append(folder, Attempt("41_1", 0, ["n1"], "", "", 1, None, "stop", "some have failed"))
    del known["41_1"]
    assert status.phases([folder])[folder] == ("failed", "exit code 1")
    shown = submit_suite(Order(SUITE, runs), dry_run=True)
    assert "--array=0-0" in shown and "task 0: b: newest" in shown and "passed over, queued or running: a" in shown
    assert len(made) == 2


def test_a_run_that_is_yet_to_be_trained_is_evaluated_after_it(tmp_path, queue):
    made, _ = queue
    run = run_of(tmp_path / "r")
    with pytest.raises(ConfigError, match="holds no checkpoint yet"):
        submit_suite(Order(SUITE, [str(run)]), dry_run=False)
    submit_suite(Order(SUITE, [str(run)], after="7"), dry_run=False)
    assert "--dependency=afterok:7" in made[0][0] and told(made[0][2], 0).arguments[4] == str(run)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["glyphs"], "say what is evaluated"),
        (["glyfs", "run"], "did you mean 'glyphs'"),
        (["run", "glyphs"], "the suite comes first: sluice submit glyphs run"),
        (["mae.toml", "run"], "mae.toml is no suite, it has no [[evals]]: it takes no run"),
        (["mae.toml", "--procs", "2"], "--procs does not belong to mae.toml, which is no suite"),
        (["glyphs", "run", "--nodes", "2"], "--nodes does not belong to glyphs, which is a suite"),
        (["glyphs", "run", "--array", "0-3"], "--array does not belong to glyphs"),
        (["glyphs", "run", "--procs", "2"], "a node of this cluster has 1"),
        (["glyphs", "run", "--weights", "best"], "--weights best: write model, ema"),
        (["here", "run", "--include", "own"], "here is a suite's name (own/here.toml) and something here"),
        (["glyphs", "nowhere"], "there is no nowhere"),
    ],
)
def test_what_is_no_suite_or_two_things_is_refused(words, says, tmp_path, monkeypatch, queue):
    monkeypatch.chdir(tmp_path)
    run_of(Path("run"), 3)
    shutil.copy(ROOT / "configs" / "smoke" / "mae.toml", "mae.toml")
    Path("here").mkdir()
    Path("own").mkdir()
    shutil.copy(SUITE, "own/here.toml")
    result = CliRunner().invoke(app, ["submit", *words])
    assert isinstance(result.exception, ConfigError) and says in str(result.exception)
    assert not queue[0]


def test_a_suite_after_the_runs_of_an_array(tmp_path, queue):
    made, _ = queue
    runs = [tmp_path / "runs" / name for name in "ab"]
    assert evaluations.submit_after(Order(SUITE, []), runs, "7") == "41"
    options, _, environment = made[0]
    assert {"--array=0-1", "--dependency=aftercorr:7", "--kill-on-invalid-dep=yes"} <= set(options)
    assert [told(environment, number).arguments[4] for number in (0, 1)] == [str(run) for run in runs]


def test_a_sweep_is_submitted_from_the_command_line(tmp_path, glyphs, queue):
    base = {"base": [str(ROOT / "configs" / "smoke" / "mae.toml")], "data": {"train": str(glyphs / "train")}}
    runs, grid = {"folder": str(tmp_path / "runs"), "length": "6ba"}, {"optimizer.lr": [1e-4, 0.5]}
    file = write(tmp_path / "s.toml", **base, run=runs, sweep={"grid": grid})
    shown = CliRunner().invoke(app, ["sweep", str(file), "--nodes", "1", "--at-once", "1", "--dry-run"])
    assert shown.exit_code == 0 and "--array=0-1%1" in shown.output and "task 1: lr=0.5" in shown.output
    refused = CliRunner().invoke(app, ["sweep", str(file), "--at-once", "1"])
    assert "say how many nodes a run has" in str(refused.exception)
