"""``sluice init``: a recipe with what it builds on, a suite and a cluster's profile, to start from."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from launch.profile import HOME
from pipeline.config.load import read_layers
from pipeline.core.errors import ConfigError, LaunchError
from pipeline.core.registry import suggest

CONFIGS = HOME / "configs"
PROFILE = HOME / "slurm" / "profiles" / "example.toml"


def copy_start(folder: Path, recipe: str, suite: str) -> str:
    """Copy them below ``folder``, at the places that they have in the project. Returns what to do next.

    Raises:
        ConfigError: no such recipe or suite.
        LaunchError: a file is there already, and nothing was copied; or the folder cannot be written.
    """
    layers = [layer for name in (recipe, suite) for layer in read_layers(_shipped(name))]
    files = list(dict.fromkeys(Path(layer.name).resolve().relative_to(HOME) for layer in layers))
    files.append(PROFILE.relative_to(HOME))
    if there := [file for file in files if (folder / file).exists()]:
        raise LaunchError(f"{folder / there[0]} is there already; nothing was copied, name another folder")
    try:
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(HOME / file, folder / file)
    except OSError as error:
        raise LaunchError(f"cannot write {error.filename}: {error.strerror}") from error
    run, evaluation = f"configs/{recipe}.toml", f"configs/{suite}.toml"
    copied = "\n".join(str(folder / file) for file in files)
    return f"""{copied}

The first lines of {run} say which data it wants. Then, of a cluster only with a profile that fits it:
  cd {shlex.quote(str(folder))}
  sluice check {run}
  sluice train {run}
  sluice submit {run} --nodes 4 --cluster {PROFILE.stem} --dry-run
  sluice eval RUN {evaluation}"""


def _shipped(name: str) -> Path:
    """The file of a configuration that comes with the program."""
    path = CONFIGS / f"{name}.toml"
    names = sorted(str(p.relative_to(CONFIGS).with_suffix("")) for p in CONFIGS.rglob("*.toml"))
    if name not in names:
        raise ConfigError(f"no configuration {name!r} comes with sluice; {suggest(name, names)}")
    return path
