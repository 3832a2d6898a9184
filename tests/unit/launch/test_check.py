import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli
from pipeline.core.manifest import Manifest, Shard, save

ROOT = Path(__file__).parents[3]
BAD = sorted((ROOT / "tests" / "bad_configs").glob("*.toml"))
RUN = """
run = {folder = "runs/x", length = "2ep", global_batch = 8}
data = {train = "shards"}
objective = {name = "mae"}
optimizer = {lr = 1e-3}
engine = {name = "deepspeed", micro_batch = 2}
schedule = {name = "constant", warmup = "2ba", cooldown = "50%"}
every = {showcase = "0ba"}
"""


@pytest.fixture(autouse=True)
def beside_shards(tmp_path, monkeypatch):
    """The current folder holds a data set of 100 samples and a configuration."""
    monkeypatch.chdir(tmp_path)
    shard = Shard("a.tar", samples=100, bytes=10240, sha256="0" * 64)
    Path("shards").mkdir()
    save(Manifest(root="shards", shards=(shard,), fields={"image": ("png",)}), "shards")
    Path("run.toml").write_text(RUN)


def sluice(monkeypatch, *arguments):
    """Exit code of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["sluice", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0


def python(*arguments):
    """A Python process that imports this checkout."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_there_are_bad_configs():
    assert len(BAD) >= 12


@pytest.mark.parametrize("path", BAD, ids=lambda p: p.stem)
def test_every_mistake_is_listed_and_no_other(path, monkeypatch, capsys):
    expected = [line[2:] for line in path.read_text().splitlines() if line.startswith("# ")]
    assert expected
    assert sluice(monkeypatch, "check", path) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    first, *lines = err.splitlines()
    if lines:
        count = "1 mistake" if len(expected) == 1 else f"{len(expected)} mistakes"
        assert first == f"sluice: {path}: {count}"
        assert sorted(line.removeprefix("  ") for line in lines) == sorted(expected)
    else:
        assert expected[0] in first


@pytest.mark.parametrize("command", [["check"], ["train"], ["eval", "runs/x"]], ids=lambda c: c[0])
def test_no_traceback_from_the_command_itself(command):
    done = python("-m", "launch", *command, ROOT / "tests/bad_configs/suite.toml")
    assert done.returncode == 2
    assert done.stderr.startswith("sluice: ") and "mistakes\n" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_plan_is_shown(monkeypatch, capsys):
    assert sluice(monkeypatch, "check", "run.toml", "--procs", "2", "--set", "run.seed=3") == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    facts = {name: text.strip() for name, text in lines.items()}
    assert facts["global batch"] == "8 = 2 ranks x 2 samples x 2 accumulated"
    assert facts["length"] == "2ep = 24 steps = 192 samples"
    assert facts["learning rate"] == "0.001 at most, constant, 2 steps of warm-up, 12 of cool-down"
    assert facts["every"] == "log 10 steps, checkpoint 1,000 steps, showcase never"


def test_suite_is_sound(monkeypatch, capsys):
    Path("suite.toml").write_text('streams = {train = "a", val = "b"}\nevals = [{name = "knn", k = [5]}]')
    assert sluice(monkeypatch, "check", "suite.toml") == 0
    assert capsys.readouterr().out == "suite.toml is sound\n"


def modules_after(code):
    """Names of the packages that a Python process has imported at the end."""
    done = python(
        "-c", f"{code}\nimport sys, json; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_quick_part_imports_no_framework():
    quick = modules_after(
        "from pipeline.config.load import load_run, dump\n"
        "from pipeline.config.resolve import resolve, learning_rate\n"
        "from pipeline.core import manifest, components\n"
        "import launch.check, launch.local, launch.supervise\n"
        "c = load_run('run.toml'); dump(c)\n"
        "learning_rate(resolve(c, manifest.load(c.data.train).samples, 2), 0)"
    )
    assert not quick & {"torch", "numpy", "deepspeed", "timm", "webdataset", "accelerate", "PIL"}


def test_help_imports_next_to_nothing():
    shown = modules_after(
        "import sys; sys.argv = ['sluice', '--help']\nfrom launch.cli import main\ntry: main()\nexcept SystemExit: pass"
    )
    assert not shown & {"torch", "numpy", "pydantic", "rich", "data_prep"}


def test_fields_that_cannot_be_read_are_found_before_the_start(monkeypatch, capsys):
    """All at once: a member that the data lacks, a tokenizer, settings, an unknown kind; and a list of keys."""
    data = """
data.train = "shards"
data.fields = ["image", "label", "text", "teacher", "odd"]
data.field.teacher = {name = "vector", sise = 4}
data.field.odd = {name = "odd"}
"""
    Path("run.toml").write_text(RUN.replace('data = {train = "shards"}', data))
    assert sluice(monkeypatch, "check", "run.toml") == 2
    found = capsys.readouterr().err
    for problem in (
        "data.fields: shards has no field 'label', only image",
        "data.captions.fields: shards has no field 'caption', only image",
        "data.field.teacher.sise: unknown key",
        "data.field.odd: unknown kind of field 'odd'",
    ):
        assert problem in " ".join(found.split())
    Path("run.toml").write_text(RUN.replace('{train = "shards"}', '{train = "shards", where = "score >"}'))
    assert sluice(monkeypatch, "check", "run.toml") == 2
    assert "data.where score >: " in capsys.readouterr().err
