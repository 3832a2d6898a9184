"""MLflow, in local files: ``RUN/mlruns``; no server. ``mlflow ui --backend-store-uri RUN/mlruns`` shows it.

A run of MLflow cannot be cut at a step. So each start writes a new one, from the run's own metrics, and takes the old
one away when it is whole.
"""

from __future__ import annotations

import importlib
import os
import re
import time
import tomllib
from collections.abc import Mapping
from typing import Any

from pipeline.config.changes import flat
from pipeline.record.logger import Begun, Logger
from pipeline.record.pictures import Shown

PACKAGE = "mlflow"
FOLDER = "mlruns"
FILES_ALLOWED = "MLFLOW_ALLOW_FILE_STORE"
"""MLflow would rather have a database, which a network's file system cannot hold safely."""
MANY = 1000
"""Metrics that MLflow takes at once; of settings a hundred."""
LETTERS = 6000
"""Of a setting."""
_ODD = re.compile(r"[^\w\-. :/]")


class MLflow(Logger):
    """One run in an experiment that is called as the folder that the run lies in."""

    def __init__(self, begun: Begun) -> None:
        os.environ.setdefault(FILES_ALLOWED, "true")
        entities = importlib.import_module("mlflow.entities")  # an extra: it need not be there for what reads this file
        tracking = importlib.import_module("mlflow.tracking")
        folder = begun.folder.resolve()
        self._metric = entities.Metric
        self._client = tracking.MlflowClient(tracking_uri=(folder / FOLDER).as_uri())
        name = folder.parent.name or "sluice"
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        before = [run.info.run_id for run in self._client.search_runs([experiment])]
        self._run = self._client.create_run(experiment, run_name=folder.name).info.run_id
        settings = [
            entities.Param(key, str(value)[:LETTERS]) for key, value in flat(tomllib.loads(begun.config)).items()
        ]
        for start in range(0, len(settings), 100):
            self._client.log_batch(self._run, params=settings[start : start + 100])
        self._log([self._of(step, *item) for step, values in begun.scalars() for item in values.items()])
        for step, pictures in begun.pictures().items():
            for shown in pictures:
                self.picture(step, shown)
        for old in before:
            self._client.delete_run(old)

    def _of(self, step: int, name: str, value: float) -> Any:
        """A metric as MLflow has it; letters that it does not take in names become "_"."""
        return self._metric(_ODD.sub("_", name), float(value), int(time.time() * 1000), step)

    def _log(self, metrics: list[Any]) -> None:
        for start in range(0, len(metrics), MANY):
            self._client.log_batch(self._run, metrics=metrics[start : start + MANY])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """All of a step at once."""
        self._log([self._of(step, name, value) for name, value in values.items()])

    def picture(self, step: int, shown: Shown) -> None:
        """As an artifact, "showcase/step-00000100/NAME.png"."""
        self._client.log_artifact(self._run, str(shown.path), f"showcase/step-{step:08d}")

    def close(self) -> None:
        """Say that it is over for now."""
        self._client.set_terminated(self._run)
