"""The built wheel in an environment of its own, far from the checkout: it submits, trains and evaluates."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("pipeline", "launch", "data_prep", "slurm", "configs", "pyproject.toml", "README.md", "LICENSE")
Sluice = Callable[..., subprocess.CompletedProcess[str]]


def done(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and, of this one, all libraries but not the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, source / part)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    built = done(sys.executable, "-c", build, cwd=source)
    assert built.returncode == 0, built.stderr
    shutil.rmtree(source)
    venv.create(folder / "venv", symlinks=True)
    python = str(folder / "venv" / "bin" / "python")
    wheel = str(next(folder.glob("*.whl")))
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    installed = done(*pip, cwd=folder)
    assert installed.returncode == 0, installed.stderr
    libraries = [p for p in sys.path if p.endswith("site-packages")]
    (next(folder.glob("venv/lib/*/site-packages")) / "libraries.pth").write_text("\n".join(libraries))
    found = done(python, "-c", "import launch, pipeline; print(launch.__file__, pipeline.__file__)", cwd=folder)
    assert found.returncode == 0 and found.stdout.count(str(folder / "venv")) == 2, found
    return folder


@pytest.fixture(scope="module")
def sluice(place: Path) -> Sluice:
    assert done(str(place / "venv/bin/sluice"), "init", "work", cwd=place).returncode == 0
    return lambda *words: done(str(place / "venv/bin/sluice"), *words, cwd=place / "work")


def test_what_is_copied_is_what_the_project_has(place, sluice):
    files = sorted(str(p.relative_to(place / "work")) for p in (place / "work").rglob("*") if p.is_file())
    assert files == ["configs/demo/mae_glyphs.toml", "configs/eval/glyphs50.toml", "slurm/profiles/example.toml"]
    assert all((place / "work" / file).read_bytes() == (ROOT / file).read_bytes() for file in files)


def test_a_recipe_comes_with_what_it_builds_on(place, sluice):
    assert sluice("init", "more", "--recipe", "pretrain/mae_vit_b_1600", "--suite", "eval/imagenet").returncode == 0
    assert {"mae_pretrain.toml"} == {p.name for p in (place / "work/more/configs/base").iterdir()}
    again = sluice("init", "more", "--recipe", "pretrain/mae_vit_b_1600")
    assert again.returncode == 2 and "is there already; nothing was copied" in again.stderr
    assert not (place / "work/more/configs/eval/glyphs50.toml").exists()
    wrong = sluice("init", "other", "--recipe", "pretrain/mae_vit_b")
    assert wrong.returncode == 2 and "did you mean" in wrong.stderr and "Traceback" not in wrong.stderr


def test_it_submits_trains_and_evaluates(place, sluice, glyphs):
    config = "configs/demo/mae_glyphs.toml"
    tiny = ["run.length=2ba", "run.global_batch=16", "engine.micro_batch=1", "every.showcase=0ba", "run.folder=run"]
    tiny += [f"data.train={glyphs}/train", "objective.encoder_args.depth=1", "engine.precision=fp32"]
    settings = [word for setting in tiny for word in ("--set", setting)]
    # Two nodes of eight ranks.
    shown = sluice("submit", config, *settings, "--cluster", "example", "--nodes", "2", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    script = next(line.split()[-1] for line in shown.stdout.splitlines() if line.endswith("pretrain.sbatch"))
    assert Path(script).is_file() and script.startswith(str(place / "venv"))
    trained = sluice("train", config, *settings)
    assert trained.returncode == 0, trained.stderr
    suite = ["--set", f"streams={{train='{glyphs}/train',val='{glyphs}/val'}}", "--set", "workers=0"]
    one = ["--set", "evals=[{name='knn',k=[5]}]"]
    evaluated = sluice("eval", "run", "configs/eval/glyphs50.toml", *suite, *one)
    assert evaluated.returncode == 0, evaluated.stderr
    (record,) = (place / "work/run/results").glob("*.json")
    assert json.loads(record.read_text())["origin"]["step"] == 2
    assert (place / "work/run/report.html").stat().st_size > 10_000


def test_the_batch_scripts_start_the_installed_program(place, sluice):
    """Without a checkout no PYTHONPATH is made, and the job's Python finds the package by itself."""
    (home,) = place.glob("venv/lib/*/site-packages/launch/shipped")
    told = {"SLUICE_HOME": str(home), "SLUICE_PYTHON": str(place / "venv/bin/python"), "SLUICE_JOB": "nowhere.json"}
    started = subprocess.run(
        ["bash", str(home / "slurm/pretrain.sbatch")],
        env=told | {"PATH": os.environ["PATH"]},
        cwd=place,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "nowhere.json" in started.stderr and "No module named" not in started.stderr
