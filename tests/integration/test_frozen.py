"""A teacher comes from its file: it is in no checkpoint, and only training needs it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.record.results import read_results
from tests.integration.runs import codes, die_at, metrics, overrides, rank_body, run_toy, same_course
from tests.ranks import start_ranks
from tests.toys.toy_distill import Tower

ENGINES = {
    "accelerate": "engine={name='accelerate', precision='fp32', micro_batch=2}",
    **{f"zero{n}": f"engine={{name='deepspeed', zero={n}, precision='fp32', micro_batch=2}}" for n in (1, 3)},
}


def write_teacher(path: Path, seed: int = 1) -> str:
    torch.manual_seed(seed)
    tower = Tower(3 * 8 * 8)
    tower.norm.running_mean.uniform_()
    save_file(tower.state_dict(), path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def teacher(tmp_path):
    path = tmp_path / "teacher.safetensors"
    write_teacher(path)
    return path


def settings(folder: Path, shards: Path, teacher: Path, engine: str = "accelerate", *more: str) -> list[str]:
    return overrides(folder, shards, ENGINES[engine], f"objective.teacher='{teacher}'", *more)


def with_stderr_in(said: str, rank: Callable[..., int], arguments: dict[str, Any]) -> int:
    """One rank, whose stderr goes to a file."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    return rank(**arguments)


def refused_by(rank: Callable[..., int], folder: Path, **arguments: Any) -> str:
    """What is said by one rank that ends with exit code 2; ``folder`` is for a file."""
    said = folder / "said"
    (end,) = start_ranks(1, with_stderr_in, said=str(said), rank=rank, arguments=arguments)
    assert end.problem is None, end.problem
    assert end.value == 2
    text = said.read_text()
    assert "Traceback" not in text
    return text


def refused(folder: Path, settings: list[str]) -> str:
    """What is said of a run that is refused."""
    config = str(folder.with_name(f"{folder.name}.toml"))
    return refused_by(rank_body, folder.parent, config=config, settings=settings, hurt=None)


@pytest.mark.parametrize(
    ("engine", "later_engine", "later_world"),
    [pytest.param("zero1", "zero3", 1, marks=pytest.mark.slow), ("zero3", "accelerate", 4)],
)
def test_it_is_rebuilt_from_its_file_and_in_no_checkpoint(engine, later_engine, later_world, glyphs, tmp_path, teacher):
    shards, whole, killed = glyphs / "train", tmp_path / "whole", tmp_path / "killed"
    assert codes(run_toy(2, "toy_distill", settings(whole, shards, teacher, engine))) == [0, 0]
    kill = partial(die_at, 8)
    assert codes(run_toy(2, "toy_distill", settings(killed, shards, teacher, engine), kill))[1] == -9
    moved = teacher.rename(tmp_path / "elsewhere.safetensors")
    again = settings(killed, shards, moved, later_engine, "run.change=['objective.teacher']")
    assert codes(run_toy(later_world, "toy_distill", again)) == [0] * later_world
    same_course(killed, whole)
    saved = json.loads((killed / "checkpoints" / "step-00000012" / "checkpoint.json").read_text())
    assert not [name for name in saved["tensors"] if "teacher" in name]
    digest = hashlib.sha256(moved.read_bytes()).hexdigest()
    assert saved["state"]["frozen"] == {"teacher": {"path": str(moved), "sha256": digest}}


def test_the_loss_is_that_of_the_file(glyphs, tmp_path, teacher):
    """Seen in a metric that the student does not touch; in train mode the norm would give another."""
    run = settings(tmp_path / "run", glyphs / "train", teacher, "accelerate", "run.length=1ba")
    assert codes(run_toy(1, "toy_distill", run)) == [0]
    other = tmp_path / "other.safetensors"
    write_teacher(other, seed=5)
    assert codes(run_toy(1, "toy_distill", settings(tmp_path / "b", glyphs / "train", other, "accelerate"))) == [0]
    norms = [metrics(tmp_path / name)[1]["teacher_norm"] for name in ("run", "b")]
    assert norms[0] != pytest.approx(norms[1], rel=1e-3)
    # A batch norm in train mode makes rows of variance one: their mean length would be about two.
    assert norms[0] == pytest.approx(expected_norm(glyphs / "train", teacher), rel=1e-4)


def expected_norm(shards: Path, teacher: Path) -> float:
    """Of the first batch, by the file's numbers."""
    from contextlib import closing

    from pipeline.core.manifest import load
    from pipeline.data.stream import open_stream
    from tests import toys

    data = toys.smoke_config("toy_distill").data.model_copy(update={"train": str(shards)})
    stream = open_stream(data, load(shards), seed=0, global_batch=8, micro_batch=8, rank=0, world=1)
    with closing(stream):
        image = next(stream.batches(0))[0]["image"].flatten(1).double() / 127.5 - 1
    weights = {name: value.double() for name, value in load_file(teacher).items()}
    features = image @ weights["layer.weight"].T + weights["layer.bias"]
    scale = (weights["norm.running_var"] + 1e-5).rsqrt() * weights["norm.weight"]
    return float(((features - weights["norm.running_mean"]) * scale + weights["norm.bias"]).norm(dim=1).mean())


def test_a_missing_or_changed_file_is_an_error_that_says_so(glyphs, tmp_path, teacher):
    shards, folder = glyphs / "train", tmp_path / "run"
    run = settings(folder, shards, teacher)
    assert codes(run_toy(1, "toy_distill", [*run, "run.length=6ba"])) == [0]
    digest = write_teacher(teacher, seed=2)
    said = refused(folder, run)
    assert "the objective's teacher has changed since" in said and digest[:12] in said
    teacher.unlink()
    said = refused(folder, run)
    assert f"the objective's teacher: cannot read {teacher} (No such file or directory)" in said
    write_teacher(teacher)
    fresh = settings(tmp_path / "fresh", shards, teacher)
    said = refused(folder, [*fresh, "objective.sha256='abc'"])
    assert f"{teacher} is changed: its sha256 is" in said
    save_file({"layer.weight": torch.zeros(4, 3)}, teacher)
    said = refused(folder, run)
    assert "is of another model: layer.bias is absent there and (4,) in the objective" in said
    teacher.write_bytes(b"no tensors")
    assert str(teacher) in refused(folder, run)


def exported(run: str, out: str) -> None:
    from pipeline.run.export import export
    from tests import toys

    toys.admit()
    assert export(run, None, out) == 0


def test_export_and_evaluation_do_without(glyphs, tmp_path, teacher):
    folder = tmp_path / "run"
    assert codes(run_toy(1, "toy_distill", settings(folder, glyphs / "train", teacher))) == [0]
    teacher.unlink()
    (end,) = start_ranks(1, exported, run=str(folder), out=str(tmp_path / "out"))
    assert end.problem is None, end.problem
    assert sorted(load_file(tmp_path / "out" / "objective.safetensors")) == [
        "student.layer.bias",
        "student.layer.weight",
        "student.norm.bias",
        "student.norm.weight",
    ]
    suite = tmp_path / "suite.toml"
    streams = f"streams = {{train = '{glyphs / 'train'}', val = '{glyphs / 'val'}'}}"
    suite.write_text(f"{streams}\nworkers = 0\nevals = [{{name = 'knn', k = [5]}}]\n")
    (end,) = start_ranks(1, evaluated, run=str(folder), suite=str(suite))
    assert end.problem is None, end.problem
    assert any(row.metric.startswith("knn/top1") for row in read_results(folder).rows)


def evaluated(run: str, suite: str) -> None:
    from pipeline.suites.evaluate import evaluate
    from tests import toys

    toys.admit()
    assert evaluate([run], suite) == 0
    assert evaluate([f"random:{run}"], suite) == 0
