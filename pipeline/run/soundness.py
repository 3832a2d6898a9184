"""What would end a run before its first step, found without starting it: model, fields, labels, texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from pydantic import BaseModel

from pipeline.config.load import load_suite
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
from pipeline.data.text import TextDecoder, read_tokenizer
from pipeline.nn.weights import no_initial_weights
from pipeline.record.logger import check_loggers
from pipeline.run.build import build_objective
from pipeline.suites.online import check_held_out

T = TypeVar("T")


class Reader(NamedTuple):
    """What an objective says of the texts that its encoder reads."""

    table: str
    """Where in the configuration it says so."""
    vocab: int
    """Token ids that it knows."""
    end: int | None
    """The token at which it takes a text's features; None: it takes them elsewhere."""


def problems(config: RunConfig, title: str) -> list[str]:
    """All that is wrong, none twice; the objective's settings are taken to be sound.

    Args:
        config: the run, whose data sets have manifests.
        title: what the configuration is called in a message.
    """
    found: list[str] = []
    _try(lambda: check_loggers(config.record.loggers), found)
    if (online := config.online) is not None:
        suite = _try(lambda: load_suite(online.suite), [])  # whose own mistakes are told elsewhere
        if suite is not None:
            _try(partial(check_held_out, config, suite), found)
    manifest = _try(lambda: open_data(config.data), found)
    if manifest is None:
        return found
    reader = _reader(check_component(OBJECTIVES, config.objective, title, ("objective",)), "objective")
    sound = _fields(config.data, manifest, "", reader, found)
    for name, beside in config.data.beside.items():
        if (other := _try(partial(open_beside, name, beside), found)) is not None:
            own = config.data.model_copy(update={"fields": beside.fields, "image": beside.image or config.data.image})
            sound |= _fields(own, other, f"{name}_", reader, found)
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


def _fields(data: Data, manifest: Manifest, prefix: str, reader: Reader | None, found: list[str]) -> Batch:
    """A batch of one sample as the stream would give it, of the fields that it can give.

    Args:
        data: fields and their settings.
        manifest: what has them.
        prefix: of the names, of a data set beside the first.
        reader: of texts, where the objective has one.
        found: takes what is wrong.
    """
    batch = {name: torch.zeros(1, dtype=torch.int64) for name in ("id", "epoch")}
    for name in data.fields:
        one = data.model_copy(update={"fields": (name,)})
        made = _try(partial(make_fields, manifest, one, 0, partial(read_tokenizer, manifest, data.captions)), found)
        for field in (made or {}).values():
            for column, (dtype, shape) in field.columns.items():
                batch[column] = torch.zeros(1, *shape, dtype=getattr(torch, dtype))
            if field.text is not None and reader is not None:
                found += _misread(field.text, data.captions.end, reader)
    return {prefix + name: value for name, value in batch.items()}


def _misread(text: TextDecoder, end: str, reader: Reader) -> Iterator[str]:
    """What an objective's encoder would not know of the tokens that it is given; ``end`` is the last one's name."""
    if text.words_known > reader.vocab:
        yield (
            f"{reader.table}.vocab: {reader.vocab} words, fewer than the {text.words_known} of the tokenizer; "
            "set it to that, or train a smaller tokenizer"
        )
    if reader.end not in (None, text.end):
        yield (
            f"{reader.table}.end: token {reader.end}, but the tokenizer ends texts with {end!r}, which is token "
            f"{text.end}; set it to that, or data.captions.end to the token that is meant"
        )


def _reader(settings: BaseModel, table: str) -> Reader | None:
    """The first table of settings with a vocabulary; None: the objective reads no texts."""
    values = dict(settings)
    if isinstance(vocab := values.get("vocab"), int):
        return Reader(table, vocab, values.get("end") if values.get("text_pool") == "end" else None)
    inside = (_reader(value, f"{table}.{name}") for name, value in values.items() if isinstance(value, BaseModel))
    return next((reader for reader in inside if reader is not None), None)
