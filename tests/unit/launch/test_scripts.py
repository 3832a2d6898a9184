"""The batch scripts, run by bash: what they set up, and that nothing stands between SLURM and the agent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.profile import HOME

SCRIPTS = sorted((HOME / "slurm").glob("*.sbatch"))
TELLS = """#!/bin/sh
"{python}" -c 'import json, os, sys; json.dump([sys.argv[1:], os.getppid(), dict(os.environ)], open("told", "w"))' "$@"
exit 75
"""


def start(script: Path, folder: Path, **more: str) -> tuple[int, int, list]:
    """Run a script with a stand-in for Python: the script's id and exit code, and what the stand-in was told."""
    stand_in = folder / "python"
    stand_in.write_text(TELLS.format(python=sys.executable))
    stand_in.chmod(0o755)
    told = {"SLUICE_HOME": str(HOME), "SLUICE_PYTHON": str(stand_in), "SLUICE_JOB": "job.json"}
    environment = told | {"PATH": os.environ["PATH"]} | more
    with subprocess.Popen(["bash", str(script)], env=environment, cwd=folder) as process:
        code = process.wait(timeout=60)
    return process.pid, code, json.loads((folder / "told").read_text())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_the_agent_takes_the_place_of_the_script(script, tmp_path):
    """So that it gets the signals for the batch script, and its exit code is the job's."""
    pid, code, (words, own, environment) = start(script, tmp_path)
    assert (own, code, words) == (pid, 75, ["-m", "launch.agent", "job.json"])
    assert environment["PYTHONPATH"] == str(HOME)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_a_job_may_be_queued_again_and_its_log_goes_on(script):
    options = {line for line in script.read_text().splitlines() if line.startswith("#SBATCH")}
    assert options == {"#SBATCH --requeue", "#SBATCH --open-mode=append"}


def test_modules_come_first_then_the_sites_file_then_the_checkout(tmp_path):
    (tmp_path / "setup.sh").write_text('export PYTHONPATH="/site:$FROM_MODULES"\necho setup >>order\n')
    module = '() { echo "$@" >>order; export FROM_MODULES=/m; }'
    more = {"BASH_FUNC_module%%": module, "SLUICE_MODULES": "cuda/12 gcc", "SLUICE_SETUP": str(tmp_path / "setup.sh")}
    *_, (_, _, environment) = start(SCRIPTS[0], tmp_path, **more)
    assert (tmp_path / "order").read_text() == "load cuda/12 gcc\nsetup\n"
    assert environment["PYTHONPATH"] == f"{HOME}:/site:/m"


@pytest.mark.parametrize("broken", ["SLUICE_MODULES", "SLUICE_SETUP"])
def test_a_script_whose_environment_is_broken_starts_nothing(tmp_path, broken):
    (tmp_path / "setup.sh").write_text("false\n")
    more = {"BASH_FUNC_module%%": "() { return 1; }"}
    more |= {broken: "x" if broken == "SLUICE_MODULES" else str(tmp_path / "setup.sh")}
    with pytest.raises(FileNotFoundError, match="told"):
        start(SCRIPTS[0], tmp_path, **more)
