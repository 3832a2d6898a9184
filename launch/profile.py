"""A cluster's profile: what its jobs need that is the same for all of them. TOML, checked like any configuration."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import Field

from launch.home import HOME
from launch.job import Launcher
from pipeline.config.mistakes import validate
from pipeline.config.schema import Positive, PositiveFloat, Strict, Text
from pipeline.core.errors import ConfigError
from pipeline.core.registry import suggest

PROFILES = HOME / "slurm" / "profiles"
OWN_PROFILES = Path("slurm/profiles")
"""Of the folder where a command is given."""

Word = Annotated[str, Field(pattern=r"^[^\s\x00-\x1f\x7f]+$")]
"""Text without white space or control characters."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
"""Of an environment variable."""


class Container(Strict):
    """Where the ranks live, if not on the host itself."""

    command: Annotated[tuple[Text, ...], Field(min_length=1)]
    """Goes before Python: ["apptainer", "exec", "--nv", "/images/sluice.sif"]."""
    python: Text = "python3"
    """Python inside."""


class Profile(Strict):
    """One cluster, or one way of using it. What is left out is left to SLURM."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    time: Word | None = None
    """Time limit of a job, as sbatch reads it ("24:00:00"); `sluice submit --time` replaces it."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    ranks_per_node: Positive | None = None
    """Left out: one per GPU, and one where there are none."""
    cpus_per_rank: Positive | None = None
    memory_gb: PositiveFloat | None = None
    """Of a node."""
    exclusive: bool = False
    """Whole nodes, shared with nobody."""
    modules: tuple[Word, ...] = ()
    """Loaded before anything else."""
    setup: Text | None = None
    """A shell file that every job reads after its modules; relative to the profile's folder."""
    environment: dict[Name, str] = Field(default_factory=dict)
    """Variables of the ranks. Any text: it never passes through a shell."""
    python: Text | None = None
    """Python of the host, which starts the ranks; left out: the one that submits."""
    container: Container | None = None
    scratch: Text | None = None
    """Folder of a node for temporary files (TMPDIR of the ranks)."""
    interface: Word | None = None
    """Network interface that the ranks talk over, "ib0"; left out: what host names stand for."""
    launcher: Launcher = "srun"
    """What starts the ranks of a node: srun, one task each; or DeepSpeed's launcher, one task per node."""
    stop_seconds: Annotated[int, Field(ge=10)] = 300
    """How long before the time limit a run is asked to save."""
    restarts: Annotated[int, Field(ge=0)] = 10
    """Crashes on sound nodes after which a job still starts again in its allocation."""
    requeues: Annotated[int, Field(ge=0)] = 10
    """Lost nodes after which a job is still queued again. Preemption and time limits are not counted."""
    leave_out_slow: bool = False
    """A job that is queued again leaves out nodes whose ranks stayed slower than the others', as long as the partition
    has enough others."""
    sbatch: tuple[Text, ...] = ()
    """Further options: ["--reservation=maintenance"]."""
    srun: tuple[Text, ...] = ()
    """Further options: ["--container-image=/images/sluice.sqsh"]."""

    @property
    def ranks(self) -> int:
        """On each node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def host_python(self) -> str:
        """Runs what is not a rank."""
        return self.python or sys.executable

    @property
    def rank_python(self) -> list[str]:
        """Command that starts Python in a rank."""
        if self.container is None:
            return [self.host_python]
        return [*self.container.command, self.container.python]


def load(cluster: str | None) -> tuple[str, Profile]:
    """A profile and its name.

    Args:
        cluster: a name of ``slurm/profiles/NAME.toml``, in this folder or of this program, or the path of a file;
            None: SLURM's own defaults.

    Raises:
        ConfigError: no such profile, or with every mistake in it.
    """
    if cluster is None:
        return "default", Profile()
    path = Path(cluster) if cluster.endswith(".toml") else OWN_PROFILES / f"{cluster}.toml"
    if not cluster.endswith(".toml") and not path.is_file():
        path = PROFILES / f"{cluster}.toml"
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        known = sorted({p.stem for folder in (OWN_PROFILES, PROFILES) for p in folder.glob("*.toml")})
        raise ConfigError(f"no cluster profile {path}; {suggest(path.stem, known)}, or name a file") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the cluster profile {path}: {error}") from error
    found = validate(Profile, values, str(path))
    if found.setup is not None:
        setup = (path.parent / found.setup).resolve()
        if not setup.is_file():
            raise ConfigError(f"{path}: setup: no file {setup}")
        found = found.model_copy(update={"setup": str(setup)})
    return path.stem, found
