"""A suite in which something goes wrong: what else there is, is measured, kept and shown, and nothing of it twice."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from pipeline.config.load import dump
from pipeline.core import manifest as manifests
from pipeline.core.errors import CheckpointError
from pipeline.core.manifest import Manifest
from pipeline.record.records import outcomes
from pipeline.record.results import Results, read_results
from pipeline.run.__main__ import main
from pipeline.suites import identity
from tests import toy_evals
from tests.contracts.components import RESNET, smoke_config
from tests.ranks import start_ranks
from tests.unit.data.shards import encode, picture, write_data

TRAIN = [9, 17, 4]
"""Samples of shards."""
VAL = [5, 14]


def write_run(folder: Path, objective: str, data: Path, **settings: object) -> Path:
    """The folder of a run that has not begun, for untrained models."""
    config = smoke_config(objective)
    folder.mkdir(parents=True)
    component = config.objective.model_copy(update=settings)
    used = config.data.model_copy(update={"train": str(data)})
    (folder / "config.toml").write_text(dump(config.model_copy(update={"objective": component, "data": used})))
    return folder


def members(classes: int, number: int) -> dict[str, bytes]:
    return {"cls": str(number % classes).encode(), "png": encode(picture(number))}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ragged data sets: "train" and "val"; the same without labels, with other classes, without one class."""
    folder = tmp_path_factory.mktemp("data")
    write_data(folder / "train", TRAIN, lambda n: members(7, n))
    write_data(folder / "val", VAL, lambda n: members(7, n + 100))
    write_data(folder / "six", TRAIN, lambda n: members(6, n))
    for place, name in enumerate(("unlabelled", "others")):
        whole = write_data(folder / name, VAL, lambda n, place=place: members(7, n + 200 + 100 * place))
        fields = {"image": whole.fields["image"]} if name == "unlabelled" else whole.fields
        classes = whole.classes if name == "unlabelled" else tuple(f"other {c}" for c in whole.classes)
        manifests.save(Manifest(str(folder / name), whole.shards, fields, classes), folder / name)
    return folder


@pytest.fixture(scope="module")
def mae(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "mae", "mae", data / "train")


def suite_of(folder: Path, data: Path, *evals: str, more: str = "") -> Path:
    """A suite with data sets whose "val" is another each."""
    folder.mkdir(exist_ok=True)
    sets = {"good": "val", "unlabelled": "unlabelled", "others": "others"}
    text = 'workers = 0\nbatch = 8\nfields = ["image", "label"]\n' + more
    text += "".join(f'[data.{n}]\ntrain = "{data}/train"\nval = "{data}/{v}"\n' for n, v in sets.items())
    text += f'[data.six]\ntrain = "{data}/six"\nval = "{data}/val"\n'
    text += f'[data.gone]\ntrain = "{data}/train"\nval = "{data}/nowhere"\n'
    (folder / "suite.toml").write_text(text + "".join(f"[[evals]]\n{table}\n" for table in evals))
    return folder / "suite.toml"


def evaluate(run: Path, suite: Path, out: Path, *more: str) -> int:
    """In this process, on the untrained model."""
    toy_evals.admit()
    command = ["eval", "--run", str(run), "--suite", str(suite), "--out", str(out), "--random-init", *more]
    return main(command)


def telling(run: Path, suite: Path, out: Path, *more: str) -> tuple[int, str, str]:
    """As a rank; with what it says on standard error and on standard output."""
    with redirect_stderr(io.StringIO()) as said, redirect_stdout(io.StringIO()) as shown:
        code = evaluate(run, suite, out, *more)
    return code, said.getvalue(), shown.getvalue()


def found(folder: Path) -> set[tuple[str, str]]:
    """Evaluations and data sets that there are numbers of."""
    return {(row.evaluation, row.data_name) for row in read_results(folder).rows}


def values(results: Results) -> dict[tuple[str, ...], tuple[float, float | None]]:
    return {(r.evaluation, r.data_name, r.metric, r.split): (r.value, r.stderr) for r in results.rows}


def test_what_one_data_set_lacks_fails_there_alone(mae, data, tmp_path, capsys):
    suite = suite_of(tmp_path, data, 'name = "knn"\nk = [3]', 'name = "rank"', 'name = "accuracy"\non = ["good"]')
    assert evaluate(mae, suite, tmp_path / "out") == 1
    # What "six" is measured on is what "good" is: the same number, which is there once.
    ranked = {("rank", name) for name in ("good", "unlabelled", "others")}
    assert found(tmp_path / "out") == {("knn", "good"), *ranked}
    said = capsys.readouterr()
    lines = {
        title: line
        for line in said.err.splitlines()
        if ", mae: random init: " in line
        for title in line.partition(", mae: random init: ")[0].strip().split(", ")
    }
    for title, why in {
        "knn on unlabelled": "needs the field 'label' of stream 'val'",
        "knn on others": "has samples of classes 'other c0', 'other c1'",
        "knn on six": "stream 'val' has samples of class 'c6', of which stream 'train' has none",
        "knn on gone": "no manifest at",
        "rank on gone": "no manifest at",
        "accuracy on good": "it needs the encoder 'logits'; this objective has image",
    }.items():
        assert why in lines[title], said.err
    assert len(lines) == 6 and "6 of 11 evaluations have failed" in said.err and "Traceback" not in said.err
    assert "rankme" in said.out and (tmp_path / "out" / "report.html").is_file()


def test_a_model_that_is_told_classes_is_told_them_by_the_suite(data, tmp_path, capsys):
    """Only the model knows that it needs labels, of all that the suite looks at."""
    run = write_run(tmp_path / "ddpm", "ddpm", data / "train", steps=8)
    task = 'name = "likelihood"\nsamples = 1\non = ["good"]'
    assert evaluate(run, suite_of(tmp_path, data, task), tmp_path / "out") == 0
    assert found(tmp_path / "out") == {("likelihood", "good")}
    task = task.replace("good", "unlabelled")
    assert evaluate(run, suite_of(tmp_path, data, task), tmp_path / "out") == 1
    assert 'the model is told "label"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("how", "says", "traced"),
    [
        ("not finite", "the loss is nan", False),
        ("data", "sample 7 is damaged", False),
        ("crashes", "RuntimeError: inconsistent tensor size", True),
        ("trains", "it has changed the weights or the statistics", False),
        ("training mode", "in training mode, so its numbers are refused", False),
    ],
)
def test_one_that_misbehaves_is_told_and_changes_no_other_number(how, says, traced, mae, data, tmp_path):
    """It does so on one rank alone, while the other waits for it."""
    task = f'name = "misbehave"\non = ["good"]\nhow = "{how}"\nrank = 1'
    knn, rank = 'name = "knn"\nk = [3]\non = ["good"]', 'name = "rank"\non = ["good"]'
    whole, hurt = suite_of(tmp_path / "a", data, knn, rank), suite_of(tmp_path / "b", data, knn, task, rank)
    assert evaluate(mae, whole, tmp_path / "whole") == 0
    ended = start_ranks(2, telling, run=mae, suite=hurt, out=tmp_path / "hurt")
    assert all(e.problem is None for e in ended) and [e.value[0] for e in ended] == [1, 1]
    assert values(read_results(tmp_path / "hurt")) == values(read_results(tmp_path / "whole"))
    said = ended[0].value[1]
    assert "misbehave on good, mae: random init: rank 1: " in said and says in said
    assert ("Traceback" in said) == traced and ended[1].value[1] == ""


@pytest.mark.parametrize("how", ["statistics", "hidden buffer"])
def test_statistics_of_batch_norm_and_buffers_that_no_checkpoint_holds_are_the_model_too(how, data, tmp_path, capsys):
    run = write_run(tmp_path / "run", "supervised", data / "train", **RESNET)
    if how == "hidden buffer":
        run = write_run(tmp_path / "vit", "mae", data / "train")
    suite = suite_of(tmp_path, data, f'name = "misbehave"\non = ["good"]\nhow = "{how}"')
    assert evaluate(run, suite, tmp_path / "out") == 1
    assert "it has changed the weights or the statistics" in capsys.readouterr().err
    assert read_results(tmp_path / "out").rows == []


def test_a_suite_that_was_killed_goes_on_with_what_is_not_there(mae, data, tmp_path):
    killed = 'name = "misbehave"\non = ["good"]\nhow = "killed"'
    evals = ('name = "knn"\nk = [3]\non = ["good"]', killed, 'name = "rank"\non = ["good"]')
    interrupted, out = suite_of(tmp_path, data, *evals), tmp_path / "out"
    (done,) = start_ranks(1, telling, run=mae, suite=interrupted, out=out)
    assert done.exit_code == -9, done.problem
    assert found(out) == {("knn", "good")} and not (out / "report.html").exists()
    before = {path: path.stat().st_mtime_ns for path in (out / "results").iterdir()}
    (again,) = start_ranks(1, telling, run=mae, suite=interrupted, out=out)
    code, said, shown = again.value
    assert code == 0, said
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "1 of 3 were there already" in shown and (out / "report.html").exists()
    assert "misbehave on good, mae: random init (2 of 3)" in said
    # In another process, that was never killed, all is the same to the last bit.
    shutil.copytree(out / "evaluations", tmp_path / "whole" / "evaluations")
    (whole,) = start_ranks(1, telling, run=mae, suite=interrupted, out=tmp_path / "whole")
    assert whole.value[0] == 0, whole.value[1]
    assert records(out) == records(tmp_path / "whole") and len(records(out)) >= 3


def records(folder: Path) -> dict[str, object]:
    """What was measured, bit for bit, without when and how long."""
    kept: dict[str, object] = {}
    for path in (folder / "results").iterdir():
        if path.suffix == ".json":
            body = json.loads(path.read_text())
            about = {key: value for key, value in body["about"].items() if key != "seconds"}
            kept[path.name] = {
                k: v for k, v in body.items() if k not in ("time", "digest", "about", "commit", "dirty")
            } | {"about": about}
        else:
            kept[path.name] = path.read_bytes()
    return kept


CHANGES = {
    "weights": [],
    "data": ["--set", "data.good.val='{data}/train'"],
    "crop": ["--set", "image={{size={size},crop='center',crop_fraction=0.8}}"],
    "settings": ["--set", "evals=[{{name='knn',k=[4],on=['good']}}]"],
    "limit": ["--limit", "7"],
    "code": [],
    "classes": [],
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_a_number_decides_whether_it_is_there(change, mae, data, tmp_path, monkeypatch, capsys):
    """The same again is not measured; anything else is, beside it or, where it is the same by name, in its place."""
    suite, out = suite_of(tmp_path, data, 'name = "knn"\nk = [3]\non = ["good"]'), tmp_path / "out"
    assert evaluate(mae, suite, out) == 0
    before = records(out)
    assert evaluate(mae, suite, out) == 0
    assert "1 of 1 were there already" in capsys.readouterr().out and records(out) == before
    more = [word.format(data=data, size=smoke_config("mae").data.image.size) for word in CHANGES[change]]
    if change == "weights":
        other = write_run(tmp_path / "other", "mae", data / "train", decoder_depth=1, mask_ratio=0.5)
        text = (other / "config.toml").read_text()
        (other / "config.toml").write_text(text.replace("\nseed = 0", "\nseed = 1"))
        assert text != (other / "config.toml").read_text()
        assert evaluate(other, suite, out) == 0
    else:
        if change == "code":
            monkeypatch.setattr(identity, "code_hash", lambda name: "other")
        if change == "classes":
            shutil.copytree(data / "val", tmp_path / "val")
            shutil.copytree(data / "train", tmp_path / "train")
            for name in ("val", "train"):
                whole = manifests.load(data / name)
                renamed = Manifest(str(tmp_path / name), whole.shards, whole.fields, tuple("abcdefg"))
                manifests.save(renamed, tmp_path / name)
            more = ["--set", f"data.good.val='{tmp_path}/val'", "--set", f"data.good.train='{tmp_path}/train'"]
        assert evaluate(mae, suite, out, *more) == 0
    said = capsys.readouterr()
    assert "were there already" not in said.out
    assert len(records(out)) == len(before) * (1 if change in ("code", "classes") else 2), sorted(records(out))
    assert ("by other code or with other names of classes" in said.err) == (change in ("code", "classes"))


def test_a_kept_head_is_known_by_what_is_in_it_and_not_by_where_it_lies(mae, data, tmp_path, capsys):
    task = 'name = "linear_probe"\nsteps = 2\non = ["good"]'
    assert evaluate(mae, suite_of(tmp_path, data, task), tmp_path / "trained") == 0
    kept = next((tmp_path / "trained").rglob("head.safetensors")).read_bytes()
    out, shown = tmp_path / "out", []
    for path, content in (("a", kept), ("a", kept), ("b", kept), ("a", zeroed(kept))):
        file = tmp_path / f"{path}.safetensors"
        file.write_bytes(content)
        given = suite_of(tmp_path, data, f'name = "linear_probe"\nhead = "{file}"\non = ["good"]')
        capsys.readouterr()
        assert evaluate(mae, given, out) == 0
        shown.append("1 of 1 were there already" in capsys.readouterr().out)
    assert shown == [False, True, True, False]


def zeroed(head: bytes) -> bytes:
    """The file of another head, of the same encoder."""
    length = int.from_bytes(head[:8], "little")
    return head[: 8 + length] + bytes(len(head) - 8 - length)


def test_a_record_that_is_damaged_is_named_and_measured_anew(mae, data, tmp_path, capsys):
    suite, out = suite_of(tmp_path, data, 'name = "knn"\nk = [3]\non = ["good"]'), tmp_path / "out"
    assert evaluate(mae, suite, out) == 0
    before = records(out)
    for path in sorted((out / "results").iterdir()):
        path.write_bytes(path.read_bytes()[:-20])
        capsys.readouterr()
        assert evaluate(mae, suite, out) == 0
        assert path.name in capsys.readouterr().err and records(out) == before


def test_a_trial_of_a_few_samples_says_that_it_is_one(mae, data, tmp_path, capsys):
    suite, out = suite_of(tmp_path, data, 'name = "knn"\nk = [3]\non = ["good"]'), tmp_path / "out"
    assert evaluate(mae, suite, out, "--limit", "7") == 0
    assert "knn/top1_k3 [limit=7]" in capsys.readouterr().out
    (row,) = (row for row in read_results(out).rows if row.metric == "knn/top1_k3")
    assert (row.n, row.limit) == (7, 7)
    assert evaluate(mae, suite, out, "--limit", "100000") == 0  # more than there are is the whole
    whole = [row for row in read_results(out).rows if row.metric == "knn/top1_k3" and row.limit is None]
    assert [row.n for row in whole] == [sum(VAL)]


def as_a_user(run: Path, suite: Path, out: Path, world: int) -> str:
    """What the command shows that starts the ranks."""
    words = ["eval", str(run), str(suite), "--random-init", "--out", str(out), "--procs", str(world)]
    done = subprocess.run(
        [sys.executable, "-m", "launch", *words],
        cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def at_once(run: Path, suite: Path, out: Path, world: int) -> str:
    """What all ranks show."""
    ended = start_ranks(world, telling, run=run, suite=suite, out=out)
    assert [e.problem for e in ended] == [None] * world and [e.value[0] for e in ended] == [0] * world
    return "".join(e.value[2] for e in ended)


@pytest.mark.parametrize(
    ("start", "worlds"), [(at_once, (2, 4)), pytest.param(as_a_user, (2,), marks=pytest.mark.slow)]
)
def test_any_number_of_ranks_gives_the_same_numbers(start, worlds, mae, data, tmp_path):
    """Ragged shards, shared out in other ways."""
    suite = suite_of(tmp_path, data, 'name = "knn"\nk = [3, 5]\non = ["good"]', 'name = "rank"\non = ["good"]')
    assert evaluate(mae, suite, tmp_path / "alone") == 0
    alone = read_results(tmp_path / "alone")
    for world in worlds:
        assert start(mae, suite, tmp_path / str(world), world).count("knn/top1_k3") == 1
        found = read_results(tmp_path / str(world))
        assert [row.key for row in found.rows] == [row.key for row in alone.rows]
        for row, expected in zip(found.rows, alone.rows, strict=True):
            assert row.value == pytest.approx(expected.value, rel=1e-6, abs=1e-6), row.metric
            assert (row.n, row.stderr is None) == (expected.n, expected.stderr is None)
            if expected.outcomes is not None and row.outcomes is not None:
                assert outcomes(row.outcomes, row.n).values == pytest.approx(
                    outcomes(expected.outcomes, expected.n).values, abs=1e-5
                )


def test_an_average_of_data_sets_is_a_result_and_one_that_lacks_a_part_is_none(mae, data, tmp_path, capsys):
    knn = 'name = "knn"\nk = [3]\non = ["good", "gone"]\n'
    groups = '[groups.some]\nmetrics = ["rank/rankme"]\naverage = "macro"\n'
    groups += '[groups.all]\nmetrics = ["knn/top1_k3"]\naverage = "micro"\n'
    suite, out = (
        suite_of(tmp_path, data, knn, 'name = "rank"\non = ["good", "unlabelled"]', more=groups),
        tmp_path / "out",
    )
    assert evaluate(mae, suite, out) == 1
    said = capsys.readouterr().err
    assert "average all, mae: random init: there is none: knn on gone has failed" in said
    rows = read_results(out).rows
    (average,) = [row for row in rows if row.group]
    parts = [row.value for row in rows if row.metric == "rank/rankme"]
    assert (average.metric, average.group) == ("some/macro", "some") and len(parts) == 2
    assert average.value == pytest.approx(sum(parts) / 2)


def test_a_checkpoint_that_goes_before_it_is_opened_is_passed_over_where_that_is_asked_for(
    mae, data, tmp_path, capsys, monkeypatch
):
    suite, run = suite_of(tmp_path, data, 'name = "knn"\nk = [3]\non = ["good"]'), tmp_path / "run"
    shutil.copytree(mae, run)
    begun = run / "checkpoints" / "step-00000003"

    def vanish(*_: object) -> object:
        shutil.rmtree(begun)
        raise CheckpointError("a file is gone")

    monkeypatch.setattr("pipeline.suites.evaluate.open_subject", vanish)
    for more, code, says in ((["--fleeting"], 0, "passed over run: step 3"), ([], 1, "a file is gone")):
        begun.mkdir(parents=True)
        (begun / "checkpoint.json").write_text('{"state": {"step": 3}}')
        assert main(["eval", "--run", f"{run}@3", "--suite", str(suite), "--out", str(tmp_path / "out"), *more]) == code
        told = capsys.readouterr()
        assert says in told.out + told.err
