"""What would end a run before its first step, found without starting it: model, fields, labels, texts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from pydantic import BaseModel

from pipeline.config.mistakes import Mistakes
from pipeline.config.schema import Data, RunConfig
from pipeline.core.components import OBJECTIVES, check_component
from pipeline.core.contract import check_batch
from pipeline.core.errors import SluiceError
from pipeline.core.manifest import Manifest
from pipeline.core.protocols import Batch, Objective
from pipeline.data.dataset import open_beside, open_data
from pipeline.data.facts import facts
from pipeline.data.field import make_fields
from pipeline.data.text import read_tokenizer
from pipeline.nn.weights import no_initial_weights
from pipeline.run.build import build_objective

T = TypeVar("T")


def problems(config: RunConfig, title: str) -> list[str]:
    """All that is wrong, none twice; the objective's settings are taken to be sound.

    Args:
        config: the run, whose data sets have manifests.
        title: what the configuration is called in a message.
    """
    found: list[str] = []
    manifest = _try(lambda: open_data(config.data), found)
    if manifest is None:
        return found
    limit = _vocabulary(check_component(OBJECTIVES, config.objective, title, ("objective",)))
    sound = _fields(config.data, manifest, "", limit, found)
    for name, beside in config.data.beside.items():
        if (other := _try(partial(open_beside, name, beside), found)) is not None:
            own = config.data.model_copy(update={"fields": beside.fields, "image": beside.image or config.data.image})
            sound |= _fields(own, other, f"{name}_", limit, found)
    objective = _try(lambda: _build(config, manifest, title), found)
    if objective is not None and not found:
        _try(lambda: check_batch(objective.needs, sound, config.objective.name), found)
    return list(dict.fromkeys(found))


def _try(work: Callable[[], T], found: list[str]) -> T | None:
    """What ``work`` gives; None, and its words among those found, where it cannot."""
    try:
        return work()
    except Mistakes as mistakes:
        found += mistakes.problems
    except SluiceError as error:
        found.append(str(error))
    return None


def _build(config: RunConfig, manifest: Manifest, title: str) -> Objective:
    """The objective without memory for its weights, and without reading any."""
    with torch.device("meta"), no_initial_weights():
        return build_objective(config, facts(config.data, manifest), title)


def _fields(data: Data, manifest: Manifest, prefix: str, limit: tuple[str, int] | None, found: list[str]) -> Batch:
    """A batch of one sample as the stream would give it, of the fields that it can give.

    Args:
        data: fields and their settings.
        manifest: what has them.
        prefix: of the names, of a data set beside the first.
        limit: see :func:`_vocabulary`.
        found: takes what is wrong.
    """
    batch = {name: torch.zeros(1, dtype=torch.int64) for name in ("id", "epoch")}
    for name in data.fields:
        one = data.model_copy(update={"fields": (name,)})
        made = _try(partial(make_fields, manifest, one, 0, partial(read_tokenizer, manifest, data.captions)), found)
        for field in (made or {}).values():
            for column, (dtype, shape) in field.columns.items():
                batch[column] = torch.zeros(1, *shape, dtype=getattr(torch, dtype))
            known = field.text.words_known if field.text is not None else 0
            if limit is not None and known > limit[1]:
                found.append(
                    f"objective.{limit[0]}: {limit[1]} words, fewer than the {known} of the tokenizer; "
                    "set it to that, or train a smaller tokenizer"
                )
    return {prefix + name: value for name, value in batch.items()}


def _vocabulary(settings: BaseModel) -> tuple[str, int] | None:
    """Where an objective says how many words it knows, and how many; None: it reads no texts."""
    for name, value in settings:
        if name == "vocab" and isinstance(value, int):
            return name, value
        if isinstance(value, BaseModel) and (inside := _vocabulary(value)) is not None:
            return f"{name}.{inside[0]}", inside[1]
    return None
