"""Objectives of the tests' own: the smallest ones that have phases, surveys or frozen parts.

They pass the contract tests as those of the product do. A rank that is to train one calls :func:`admit` first; one that
is to run an evaluation of the tests' own (``tests/toy_evals``), :func:`tests.toy_evals.admit`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config.schema import RunConfig

FOLDER = Path(__file__).parent


def smoke_config(name: str) -> RunConfig:
    """The smallest run of a toy."""
    table: dict[str, Any] = {
        "run": {"folder": f"runs/smoke/{name}", "length": "8ba", "global_batch": 8},
        "data": {"train": "shards/smoke/train", "fields": ["image"], "workers": 0, "image": {"size": 8}},
        "objective": {"name": name},
        "optimizer": {"lr": 1e-2},
        "engine": {"name": "accelerate", "precision": "fp32", "micro_batch": 4},
    }
    return RunConfig.model_validate(table)


def admit() -> None:
    """In this process, the program finds the toys among its objectives."""
    import pipeline.objectives

    if str(FOLDER) not in pipeline.objectives.__path__:
        pipeline.objectives.__path__.append(str(FOLDER))
