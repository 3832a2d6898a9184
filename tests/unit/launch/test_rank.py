"""A task of srun becomes a rank: its place, its exit code, and a deaf ear for SIGUSR1 until it listens itself."""

from __future__ import annotations

import os
import subprocess
import sys

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS_PER_NODE": "2",
}
CODE = """
import os, signal, sys
os.kill(os.getpid(), signal.SIGUSR1)
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "LOCAL_WORLD_SIZE")
print([os.environ[n] for n in names], sys.argv[1:])
sys.exit(75)
"""


def test_a_task_becomes_a_rank(tmp_path):
    (tmp_path / "rank_program.py").write_text(CODE)
    command = [sys.executable, "-m", "launch.rank", "-m", "rank_program", "a b", "{node}", "x{node}", "$(x)"]
    path = os.pathsep.join([os.getcwd(), str(tmp_path)])
    done = subprocess.run(command, env=os.environ | SLURM | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
    assert done.stdout == "['5', '1', '8', '2', '2'] ['a b', '2', 'x{node}', '$(x)']\n"
