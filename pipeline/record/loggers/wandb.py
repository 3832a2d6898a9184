"""Weights & Biases, offline: ``RUN/wandb``; nothing is sent. ``wandb sync RUN/wandb/offline-run-*`` sends it, when and
from where one likes, and replaces what was sent of the run before.

An offline run cannot be cut at a step. So each start writes a new one, from the run's own metrics, and takes the old
one away when it is whole.
"""

from __future__ import annotations

import importlib
import secrets
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path

from pipeline.config.changes import flat
from pipeline.record.logger import Begun, Logger
from pipeline.record.pictures import Shown

PACKAGE = "wandb"
FOLDER = "wandb"
ID = "run-id"
"""Holds the name by which Weights & Biases knows the run, from start to start."""


class Wandb(Logger):
    """One offline run, whole at any time."""

    def __init__(self, begun: Begun) -> None:
        wandb = importlib.import_module(PACKAGE)  # an extra: it need not be there for what reads this file
        place = begun.folder / FOLDER
        place.mkdir(exist_ok=True)
        before = list(place.glob("offline-run-*"))
        folder = begun.folder.resolve()
        self._wandb = wandb
        self._run = wandb.init(
            mode="offline",
            dir=str(begun.folder),
            id=_own_id(place),
            project=folder.parent.name or "sluice",
            name=folder.name,
            config=flat(tomllib.loads(begun.config)),
            # The run's own log has its output, and its metrics the speed of the machine.
            settings=wandb.Settings(
                console="off", silent=True, x_disable_stats=True, x_disable_meta=True, disable_git=True, save_code=False
            ),
        )
        pictures = begun.pictures()
        scalars = dict(begun.scalars())
        for step in sorted({*scalars, *pictures}):
            self.scalars(step, scalars.get(step, {}))
            for shown in pictures.get(step, []):
                self.picture(step, shown)
        for old in before:
            if old.resolve() != Path(self._run.dir).resolve().parent:
                shutil.rmtree(old, ignore_errors=True)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """As they are, at the run's own steps."""
        self._run.log(dict(values), step=step)

    def picture(self, step: int, shown: Shown) -> None:
        """Under "showcase/"."""
        self._run.log({f"showcase/{shown.name}": self._wandb.Image(str(shown.path), caption=shown.caption)}, step=step)

    def close(self) -> None:
        """Write out what is held, and wait for it: the process that writes the file ends after the run does."""
        self._run.finish()
        self._wandb.teardown()


def _own_id(place: Path) -> str:
    """Made at the first start."""
    file = place / ID
    if not file.exists():
        file.write_text(secrets.token_hex(8), encoding="ascii")
    return file.read_text(encoding="ascii").strip()
