"""What decides a number: weights, evaluation with its settings, data, seed. Names are for people and no part of it."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel

from pipeline.config.schema import Component, Image
from pipeline.core.components import EVALS
from pipeline.core.evaluation import EvalStream, Evaluation
from pipeline.nn.weights import weights_hash
from pipeline.record.found import Origin
from pipeline.suites.context import Context
from pipeline.suites.subject import Subject

JUDGE = "judge."
"""Before the names of encoders that judge."""
_CODE = ("pipeline.evals.", "pipeline.nn.")
"""Where the code lies that makes numbers of features, and features of images."""


def origin_of(
    subject: Subject,
    weights: str,
    name: str,
    evaluation: Evaluation,
    settings: BaseModel,
    image: Image,
    context: Context,
    limit: int | None = None,
    fields: Mapping[str, Component] | None = None,
) -> Origin:
    """Of the numbers that an evaluation yields.

    Args:
        subject: what is measured.
        weights: their hash.
        name: of the evaluation.
        evaluation: with these settings.
        settings: all of them, with every default.
        image: geometry of the images.
        context: what the evaluation is given.
        limit: samples of each stream that are looked at; None: all.
        fields: settings of fields, of which those count that are looked at.
    """
    uses = evaluation.uses()
    own: dict[str, Any] = settings.model_dump(mode="json")
    seed = own.pop("seed", None)
    named = streams_named(own, uses.streams)
    settled = {key: value for key, value in own.items() if key not in {use.partition(".")[0] for use in named}}
    # Before it could be chosen, it was bicubic.
    unsaid = {"interpolation"} if image.interpolation == "bicubic" else None
    settled["image"] = image.model_dump(mode="json", exclude=unsaid)
    if context.store.precision != "fp32":  # which all numbers had before it could be set
        settled["precision"] = context.store.precision
    if judges := {n: context.encoders[n] for n in uses.encoders if n.startswith(JUDGE)}:
        settled["judge"] = context.once(("weights", *judges), lambda: weights_hash(judges))
    data = {use: context.streams[stream].fingerprint for use, stream in named.items()}
    if limit is not None:
        settled["limit"] = limit
    seen = {field for each in (*uses.streams.values(), *uses.also.values()) for field in each}
    if set_otherwise := {n: f.model_dump(mode="json") for n, f in (fields or {}).items() if n in seen}:
        settled["fields"] = set_otherwise
    return Origin(subject.name, subject.step, weights, name, settled, data, seed, evaluation.version)


def streams_named(settings: Mapping[str, Any], streams: Collection[str]) -> dict[str, str]:
    """What each stream is used for, to its name: a stream is known by its data, and its name does not matter.

    Args:
        settings: of an evaluation; a stream is named by a value, or in a list of streams alone.
        streams: names of those that it looks at; one that no setting names is used for what its name says.
    """
    found: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, str) and value in streams:
            found[key] = value
        elif isinstance(value, list) and value and all(name in streams for name in cast("list[object]", value)):
            found |= {f"{key}.{place}": name for place, name in enumerate(cast("list[str]", value))}
    return found | {stream: stream for stream in sorted(set(streams).difference(found.values()))}


def circumstances(name: str, subject: Subject, streams: Iterable[EvalStream]) -> str:
    """Hash of what a number hangs on beside its origin, and not so that unlike ones could not be compared.

    The code, the names of the classes of the data and of the model, and its words: where one is another, what was
    measured is measured anew.
    """
    classes = sorted({(stream.fingerprint, stream.classes) for stream in streams})
    words = hashlib.sha256(subject.tokenizer or b"").hexdigest()
    facts = [code_hash(name), classes, subject.classes, words]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def code_hash(name: str) -> str:
    """Hash of the source of an evaluation and of all that it imports of evaluations and networks."""
    found = hashlib.sha256()
    for module, source in sorted(_sources(f"{EVALS}.{name}").items()):
        found.update(f"{module} {len(source)}".encode() + source)
    return found.hexdigest()[:32]


def _sources(module: str) -> dict[str, bytes]:
    """Module to its source, with those that it imports."""
    found: dict[str, bytes] = {}
    wanted = [module]
    while wanted:
        name = wanted.pop()
        if name not in found and (path := _file(name)) is not None:
            found[name] = path.read_bytes()
            wanted += [other for other in _imports(found[name]) if f"{other}.".startswith(_CODE)]
    return found


@cache
def _file(module: str) -> Path | None:
    """Of a module; None: the name is of something in a module."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def _imports(source: bytes) -> Iterator[str]:
    """Modules, and names in modules, that a source imports anywhere."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
