"""What the house asks of every file: style, types, layers, sizes, and configurations that load."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pipeline.config.load import load
from pipeline.config.sweep import is_sweep, load_sweep
from pipeline.core import registry

ROOT = Path(__file__).parents[2]
FILES = sorted(p for room in ("pipeline", "launch", "data_prep", "tests") for p in (ROOT / room).rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").rglob("*.toml"))
SCRIPTS = [ROOT / ".ci" / "run", *sorted((ROOT / "slurm").rglob("*.s*"))]
FILE_LINES, FUNCTION_LINES, LOOP_LINES = 400, 60, 150


def name(path):
    return str(path.relative_to(ROOT))


def passes(*command):
    """The command's output, when it fails, is the test's message."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    if done.returncode:
        pytest.fail(done.stdout + done.stderr, pytrace=False)


def test_ruff_finds_nothing():
    passes(sys.executable, "-m", "ruff", "check", "--quiet", "--output-format=concise", ".")


def test_formatted():
    passes(sys.executable, "-m", "ruff", "format", "--check", "--quiet", ".")


def test_types():
    passes(sys.executable, "-m", "pyright", "--pythonpath", sys.executable)


def test_arrows_point_down():
    passes(sys.executable, "-c", "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck (.ci/run installs it)")
def test_shellcheck_finds_nothing():
    passes("shellcheck", *map(str, SCRIPTS))


def functions(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{name(path)}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


def test_files_and_functions_are_small():
    assert FILES
    long_files = {name(p): n for p in FILES if (n := len(p.read_text().splitlines())) > FILE_LINES}
    long_functions = {f: n for p in FILES for f, n in functions(p) if n > FUNCTION_LINES}
    assert not long_files
    assert not long_functions


def test_the_loop_fits_on_a_screen_or_two():
    assert len((ROOT / "pipeline/engine/loop.py").read_text().splitlines()) <= LOOP_LINES


def test_no_drawer_for_everything():
    assert not [name(p) for p in FILES if p.stem.strip("_") in {"utils", "util", "misc", "helpers", "common"}]


def test_code_is_ascii():
    lines = ((path, n, line) for path in FILES for n, line in enumerate(path.read_text().splitlines(), 1))
    found = [f"{name(path)}:{n}" for path, n, line in lines if not line.isascii()]
    assert not found


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_shipped_configuration(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#"), "say first what it is for"
    if path.parent.name == "base":
        tomllib.loads(text)  # a part; the files that build on it are loaded whole
    elif is_sweep(path):
        assert load_sweep(path).variants
    else:
        load(path)


@pytest.mark.parametrize("kind", ["objectives", "evals"])
def test_component_comes_with_a_test(kind):
    missing = [c for c in registry.names(f"pipeline.{kind}") if not (ROOT / f"tests/unit/{kind}/test_{c}.py").exists()]
    assert not missing
