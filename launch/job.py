"""``job.json``: all that a SLURM job is told. Its path is the only value that the batch script gets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from launch.decide import Budget
from pipeline.core.files import replace_file

Kind = Literal["pretrain", "evaluate", "prepare"]
Launcher = Literal["srun", "deepspeed"]
TASK = "{task}"
"""In an argument of a job that prepares shards: replaced by the number of the array's task."""
MASTER = "{master}"
"""An argument: replaced by the address and port where the ranks meet."""
NODE = "{node}"
"""An argument: replaced by the number of the node."""


@dataclass(frozen=True)
class Job:
    """What a job does, and in which shape."""

    kind: Kind
    run: str
    """Folder of the run, or of what is evaluated or made; ``launch/`` in it holds what launching keeps."""
    arguments: Sequence[str]
    """Of Python: ["-m", "pipeline.run", "train", ...]."""
    nodes: int = 1
    ranks_per_node: int = 1
    python: Sequence[str] = ("python3",)
    """Starts Python in a rank: its path, after the container's command where there is one."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    srun: Sequence[str] = ()
    """Further options of srun."""
    interface: str | None = None
    """Network interface that the ranks talk over; None: they find one."""
    launcher: Launcher = "srun"
    stop_seconds: int = 300
    """How long before the time limit the ranks are asked to save."""
    budget: Budget = field(default_factory=Budget)
    leave_out_slow: bool = False
    """When the job is queued again, leave out nodes that stayed slow, where enough others are there."""

    def write(self, path: Path) -> None:
        """Write it, at once."""
        replace_file(path, json.dumps(asdict(self), indent=1).encode() + b"\n")

    @classmethod
    def read(cls, path: Path) -> Job:
        """What :meth:`write` has written."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**values | {"budget": Budget(**values["budget"])})
