"""What decides a number: weights, evaluation with its settings, data, seed. Names are for people and no part of it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from pipeline.config.schema import Image
from pipeline.core.evaluation import Evaluation
from pipeline.record.results import Origin
from pipeline.suites.context import Context
from pipeline.suites.subject import Subject

JUDGE = "judge."
"""Before the names of encoders that judge."""


def weights_hash(modules: Mapping[str, nn.Module]) -> str:
    """Hash of all parameters and buffers with their names; modules that share some are hashed as often."""
    found = hashlib.sha256()
    for name, module in sorted(modules.items()):
        for key, tensor in sorted(module.state_dict().items()):
            found.update(f"{name}/{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]


def origin_of(
    subject: Subject, name: str, evaluation: Evaluation, settings: BaseModel, image: Image, context: Context
) -> Origin:
    """Of the numbers that an evaluation yields.

    Args:
        subject: what is measured.
        name: of the evaluation.
        evaluation: with these settings.
        settings: all of them, with every default.
        image: geometry of the images.
        context: what the evaluation is given.
    """
    uses = evaluation.uses()
    own: dict[str, Any] = settings.model_dump(mode="json")
    seed = own.pop("seed", None)
    # What a setting calls by name is known by its data, so that the name itself does not matter.
    streams = {key: value for key, value in own.items() if isinstance(value, str) and value in uses.streams}
    settled = {key: value for key, value in own.items() if key not in streams}
    settled["image"] = image.model_dump(mode="json")
    if judges := {n: context.encoders[n] for n in uses.encoders if n.startswith(JUDGE)}:
        settled["judge"] = context.once(("weights", *judges), lambda: weights_hash(judges))
    data = {key: context.streams[value].fingerprint for key, value in streams.items()}
    weights = context.once("weights", lambda: weights_hash(subject.encoders))
    return Origin(subject.name, subject.step, weights, name, settled, data, seed)


def folder_names(origins: Iterable[Origin]) -> list[str]:
    """A folder for each evaluation of a suite, "knn-0f3a...", by what it measures: the same when it runs again.

    Those that measure the same in streams of other names are numbered.
    """
    names, times = [], Counter[str]()
    for origin in origins:
        identity = {key: value for key, value in asdict(origin).items() if key not in ("model", "step")}
        mark = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        name = f"{origin.evaluation}-{mark}"
        times[name] += 1
        names.append(name if times[name] == 1 else f"{name}-{times[name]}")
    return names
