"""``python -m launch.rank ARGUMENTS``: one task of srun becomes one rank, told its place as any launcher tells it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping

from launch.job import NODE

NAMES = {
    "RANK": "SLURM_PROCID",
    "LOCAL_RANK": "SLURM_LOCALID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "NODE_RANK": "SLURM_NODEID",
    "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
}


def place(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of a rank from those of a task; MASTER_ADDR and MASTER_PORT come from the agent."""
    return {name: environment[slurm] for name, slurm in NAMES.items()}


def main() -> None:
    """Become the rank, so that signals and the exit code are its own."""
    os.environ.update(place(os.environ))
    # `scancel --signal=USR1` reaches every rank: one that is still starting must not die of it. Inherited.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    arguments = [os.environ["NODE_RANK"] if argument == NODE else argument for argument in sys.argv[1:]]
    os.execv(sys.executable, [sys.executable, *arguments])


if __name__ == "__main__":
    main()
