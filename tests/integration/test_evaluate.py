"""A suite on a checkpoint, whoever wrote it, beside an untrained encoder; and what it says when it cannot."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.evals.knn import KNN
from pipeline.record.results import Row, read_results
from pipeline.run.__main__ import main
from tests.integration.runs import codes, overrides, run

SUITE = """
batch = 64
workers = 0
[streams]
train = "{shards}/train"
val = "{shards}/val"
[[evals]]
name = "knn"
k = [5]
"""


@pytest.fixture(scope="module")
def trained(glyphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by two ranks under ZeRO 3, whose parameters no rank holds whole."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    own = ["engine.name=deepspeed", "engine.zero=3", "engine.precision=fp32", "run.length=6ba", "every.showcase=6ba"]
    assert codes(run(2, "mae", overrides(folder, glyphs / "train", *own))) == [0, 0]
    (folder / "suite.toml").write_text(SUITE.format(shards=glyphs))
    return folder


def rows(folder: Path) -> dict[tuple[str, str], float]:
    return {(row.model, row.metric): row.value for row in read_results(folder).rows}


def test_a_suite_on_a_sharded_checkpoint_and_on_random_weights(trained, capsys):
    suite = str(trained / "suite.toml")
    assert main(["eval", "--run", str(trained), "--suite", suite]) == 0
    assert main(["eval", "--run", str(trained), "--suite", suite, "--random-init"]) == 0
    earlier = trained / "checkpoints" / "step-00000003"
    assert main(["eval", "--run", str(trained), "--suite", suite, "--checkpoint", str(earlier)]) == 0
    found = rows(trained)
    assert {model for model, _ in found} == {"step 6", "step 3", "random init"}
    assert all(0 <= value <= 1 for value in found.values())
    assert "step 6" in capsys.readouterr().out
    before = found["step 6", "knn/top1_k5"]
    assert main(["eval", "--run", str(trained), "--suite", suite, "--again"]) == 0
    assert rows(trained)["step 6", "knn/top1_k5"] == before  # the same numbers every time
    page = (trained / "report.html").read_text()
    assert "random init" in page and "data:image" in page
    assert main(["report", "--run", str(trained), "--run", str(trained)]) == 0
    assert "run: step 6" in capsys.readouterr().out


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_showcase_of_a_sharded_model_is_drawn(trained):
    folder = trained / "showcase" / "step-00000006"
    index = json.loads((folder / "index.json").read_text())
    assert index and all((folder / f"{name}.png").stat().st_size > 500 for name in index)


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (("shards}/val", "shards}/nowhere"), 1, "no manifest at"),
        (('name = "knn"', 'name = "knm"'), 2, "did you mean 'knn'"),
        (("k = [5]", "k = [5]\nseed = 1"), 2, "seed"),
        (("k = [5]", "k = [5000000]"), 1, "5000000 neighbours"),
    ],
)
def test_what_it_cannot_do_is_one_message(change, code, says, trained, glyphs, tmp_path, capsys):
    suite = tmp_path / "suite.toml"
    suite.write_text(SUITE.replace(*change).format(shards=glyphs))
    assert main(["eval", "--run", str(trained), "--suite", str(suite)]) == code
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said


def test_a_run_without_checkpoints_says_what_to_do(trained, tmp_path, capsys):
    (tmp_path / "config.toml").write_text((trained / "config.toml").read_text())
    assert main(["eval", "--run", str(tmp_path), "--suite", str(trained / "suite.toml")]) == 2
    assert "random:" in capsys.readouterr().err


def test_an_untrained_model_is_untrained_also_where_the_run_began_from_weights(trained, glyphs, tmp_path, capsys):
    """And the file of those weights may be gone by then."""
    assert main(["export", "--run", str(trained), "--out", str(tmp_path / "out")]) == 0
    weights = tmp_path / "out" / "encoder.safetensors"
    (tmp_path / "plain").mkdir()
    for name in ("plain", "begun"):
        (tmp_path / name).mkdir(exist_ok=True)
        text = (trained / "config.toml").read_text()
        begun = text.replace('name = "mae"', f'name = "mae"\nweights = "{weights}"') if name == "begun" else text
        (tmp_path / name / "config.toml").write_text(begun)
    weights.unlink()
    found = []
    for name in ("plain", "begun"):
        command = ["eval", "--run", str(tmp_path / name), "--suite", str(trained / "suite.toml"), "--random-init"]
        assert main(command) == 0, capsys.readouterr().err
        found.append(rows(tmp_path / name))
    assert found[0] == found[1]


TWO = (
    SUITE
    + """
[[evals]]
name = "knn"
k = [5]
temperature = 1.0
"""
)


def listed(folder: Path) -> list[Row]:
    return [row for row in read_results(folder).rows if row.metric == "knn/top1_k5"]


def test_identity_is_what_was_measured_and_not_what_it_is_called(trained, glyphs, tmp_path, capsys):
    """Results elsewhere: two evaluations of one name, an unused stream, other names, other data under the same name."""
    out = ["--out", str(tmp_path / "out")]
    (tmp_path / "suite.toml").write_text(TWO.format(shards=glyphs))
    before = files_of(trained / "results")
    evaluate = ["eval", "--run", str(trained), "--suite", str(tmp_path / "suite.toml"), *out]
    assert main(evaluate) == 0
    first = listed(tmp_path / "out")
    assert [row.settings["temperature"] for row in first] == [0.07, 1.0]
    assert {row.model for row in first} == {"run: step 6"} and (tmp_path / "out" / "report.html").exists()
    said = capsys.readouterr()
    assert "knn/top1_k5 [temperature=0.07]" in said.out and "knn, run: step 6 (2 of 2)" in said.err
    renamed = TWO.replace("train =", "bank =").replace('name = "knn"', 'name = "knn"\ntrain = "bank"')
    renamed = renamed.replace("[[evals]]", 'more = "{shards}/val"\n[[evals]]', 1)
    (tmp_path / "suite.toml").write_text(renamed.format(shards=glyphs))
    assert main(evaluate) == 0
    assert listed(tmp_path / "out") == first
    assert "2 of 2 were there already" in capsys.readouterr().out
    assert main([*evaluate, "--again"]) == 0
    named = [replace(row, time="", data_names={}, outcomes=None) for row in listed(tmp_path / "out")]
    assert named == [replace(row, time="", data_names={}, outcomes=None) for row in first]
    (tmp_path / "suite.toml").write_text(TWO.format(shards=glyphs).replace(f"{glyphs}/val", f"{glyphs}/train"))
    assert main(evaluate) == 0
    assert len(listed(tmp_path / "out")) == 4
    assert files_of(trained / "results") == before


def test_each_evaluation_has_a_folder_of_its_own(trained, glyphs, tmp_path, monkeypatch):
    """Two of one name, of which each keeps a file: the second does not find the first one's."""
    whole = KNN.run

    def keeping(self, ctx):
        ctx.folder.mkdir(parents=True)
        (ctx.folder / "bank").write_text(str(self.config.temperature))
        return whole(self, ctx)

    monkeypatch.setattr(KNN, "run", keeping)
    (tmp_path / "suite.toml").write_text(TWO.format(shards=glyphs))
    out = tmp_path / "out"
    evaluate = ["eval", "--run", str(trained), "--suite", str(tmp_path / "suite.toml"), "--out", str(out)]
    assert main(evaluate) == 0
    kept = list(out.glob("evaluations/knn-*/bank"))
    assert sorted(path.read_text() for path in kept) == ["0.07", "1.0"]


def test_a_folder_that_takes_no_results_is_refused_before_anything_is_computed(trained, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("pipeline.suites.evaluate.open_subject", None)
    command = ["eval", "--run", str(trained), "--suite", str(trained / "suite.toml"), "--out", str(tmp_path / "file")]
    assert main(command) == 2
    assert "--out FOLDER" in capsys.readouterr().err


def test_results_that_the_disk_does_not_take_are_printed(trained, tmp_path, capsys, monkeypatch):
    def full(folder, outputs, origin, about):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pipeline.suites.running.keep", full)
    command = ["eval", "--run", str(trained), "--suite", str(trained / "suite.toml"), "--out", str(tmp_path / "out")]
    assert main(command) == 1
    said = capsys.readouterr()
    assert "knn/top1_k5" in said.out and "No space left on device" in said.err


def test_whoever_stops_listening_ends_no_export(trained, tmp_path):
    """``sluice export ... | head -1``: all files are written, and nothing is said of it."""
    listen, talk = os.pipe()
    os.close(listen)
    command = [sys.executable, "-m", "pipeline.run", "export", "--run", str(trained), "--out", str(tmp_path)]
    done = subprocess.run(command, stdout=talk, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(talk)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
    assert {p.name for p in tmp_path.iterdir()} >= {"encoder.safetensors", "objective.safetensors"}
