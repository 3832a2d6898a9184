"""What is measured for advice, and what is made of it; the ranks that measure are faked."""

from dataclasses import replace

import pytest

from launch import advise as module
from launch.advise import Counted, Question, advise, counted, suite
from launch.cli import main
from pipeline.config import provenance
from pipeline.config.load import load_suite
from pipeline.core.components import check_suite
from pipeline.core.errors import ConfigError, DataError
from pipeline.record.found import Failed, Results, Row
from tests.unit.data.shards import save, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make = lambda n: {"cls": str(n % 3 == 0).encode().replace(b"True", b"1").replace(b"False", b"0"), "txt": b"a"}  # noqa: E731
    manifest = write_data(folder, [60], make, {"label": ("cls",), "caption": ("txt",)})
    save(replace(manifest, classes=("a", "b")), folder)
    return str(folder)


def question(data, tmp_path, **more):
    return Question(data, "runs/mae", tmp_path / "out", **more)


@pytest.mark.parametrize("kind", ["pretrained", "untrained"])
def test_the_suite_is_sound_and_looks_at_two_parts_of_the_same_data_alone(data, tmp_path, kind):
    asked = question(data, tmp_path, share=0.25, tries="20ep")
    (tmp_path / "suite.toml").write_text(suite(asked, Counted(48, 2, 7), kind))
    plan = load_suite(tmp_path / "suite.toml")
    check_suite(plan, "suite.toml")
    assert {name: str(stream) for name, stream in plan.streams.items()} == {
        "train": f"{data}, rest of 0.25, seed 0",
        "val": f"{data}, held_out of 0.25, seed 0",
    }
    modes = [task.settings["mode"] for task in plan.evals if task.name == "finetune"]
    assert modes == (["frozen", "partial", "lp_ft", "full"] if kind == "pretrained" else ["full"])
    (shots,) = [task.settings["shots"] for task in plan.evals if task.name == "few_shot"]
    assert tuple(shots) == (1, 5)


def test_what_is_trained_on_is_counted(data, tmp_path):
    found = counted(question(data, tmp_path, share=0.2))
    assert 40 <= found.samples < 60 and found.classes == 2 and 5 < found.fewest <= 20
    with pytest.raises(ConfigError, match="advice needs two classes and 20 samples to train on"):
        counted(question(data, tmp_path, share=0.85))


def row(metric, value, evaluation=None, **settings):
    return Row(
        model="m", step=1, evaluation=evaluation or metric.split("/")[0], metric=metric, split="val", config="c",
        manifests={}, time="t", settings=settings, value=value, n=9, stderr=0.01, better="higher",
    )  # fmt: skip


@pytest.fixture
def measured(monkeypatch):
    """Ranks that give made-up numbers at once."""
    import pipeline.record.results as results

    def rows(folder):
        good = "pretrained" in str(folder)
        found = [row("knn/top1_k20", 0.5), row("transferability/top1_blocks.3", 0.9 if good else 0.3)]
        found += [row("transferability/best_depth", 1.0), row("finetune/mean_per_class_recall", 0.1, mode="full")]
        modes = {"frozen": 0.7, "full": 0.9} if good else {"full": 0.95}
        found += [row("finetune/top1", value, mode=mode) for mode, value in modes.items()]
        return Results(found, [], [])

    asked = []
    monkeypatch.setattr(module, "start", lambda arguments, procs: asked.append(arguments) or 0)
    monkeypatch.setattr(results, "read_results", rows)
    return asked


def test_both_are_measured_and_the_answer_is_kept(data, tmp_path, measured):
    text = advise(question(data, tmp_path, tries="2ep"))
    assert [arguments[2] for arguments in measured] == ["runs/mae", "random:runs/mae"]
    assert "recommended scratch: 95.0 %" in text and "negative transfer: the best from this encoder, full" in text
    assert "best_depth" not in text and (tmp_path / "out" / "advice.txt").read_text() == f"{text}\n"
    again = advise(question(data, tmp_path, tries="2ep"))
    assert again == text
    with pytest.raises(ConfigError, match="the answer to another question; name another folder"):
        advise(replace(question(data, tmp_path, tries="2ep"), encoder="runs/other"))


def test_what_has_failed_is_said(data, tmp_path, measured, monkeypatch):
    import pipeline.record.results as results

    failed = Results([], [], [], (), (Failed("knn", "m", "no such encoder", "t"),))
    monkeypatch.setattr(results, "read_results", lambda folder: failed)
    with pytest.raises(DataError, match=r"of runs/mae \(pretrained\) has failed: knn: no such encoder"):
        advise(question(data, tmp_path))


def test_mistakes_end_in_words(tmp_path, monkeypatch, capfd):
    words = ["advise", str(tmp_path), "--encoder", "x", "--out", str(tmp_path / "o")]
    monkeypatch.setattr("sys.argv", ["sluice", *words])
    monkeypatch.setenv(provenance.COMMAND, "")
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2 and "no manifest at" in capfd.readouterr().err
