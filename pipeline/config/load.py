"""Reading a configuration: TOML files, the files they build on, and overrides from the command line.

``base = ["../base/vit.toml"]`` names files, relative to the one it stands in, that are read first; what comes later
wins, table by table. Where ``name`` changes, those settings stay that the new optimizer, schedule or engine has too;
the others are dropped, and :func:`dropped` tells them. Of an objective none stay. ``--set optimizer.clip=``, with
nothing behind it, takes away what the files say, and so does ``unset = ["optimizer.clip"]`` beside ``base``. All other
paths stay as they are written: relative ones are relative to the folder that the command runs in, and neither ``~`` nor
``$HOME`` is replaced.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Sequence
from datetime import date, time
from functools import cache, reduce
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from pydantic import BaseModel

from pipeline.config import mistakes
from pipeline.config.schedule import SCHEDULES, schedule
from pipeline.config.schema import FOREIGN, Component, EngineConfig, Optimizer, RunConfig, SuiteConfig, without_silence
from pipeline.core import registry
from pipeline.core.errors import ConfigError

M = TypeVar("M", bound=BaseModel)
Table = dict[str, Any]
UNSET = object()
"""In place of a value: what earlier layers say is taken away."""
_UNNAMED = {"optimizer": "adamw", "schedule": "cosine"}
"""What a table without a name is about."""


class Layer(NamedTuple):
    """One source of values."""

    name: str
    values: Table


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig | SuiteConfig:
    """A suite if the file has ``[[evals]]``, else a run.

    Raises:
        ConfigError: with every mistake.
    """
    suite = any("evals" in layer.values for layer in read_layers(Path(path)))
    return load_suite(path, overrides) if suite else load_run(path, overrides)


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a run, from a file and ``key.path=value`` overrides.

    Raises:
        ConfigError: with every mistake.
    """
    return _load(RunConfig, Path(path), overrides)


def load_suite(path: str | Path, overrides: Sequence[str] = ()) -> SuiteConfig:
    """The configuration of a suite of evaluations.

    Raises:
        ConfigError: with every mistake.
    """
    return _load(SuiteConfig, Path(path), overrides)


def dump(config: RunConfig | SuiteConfig) -> str:
    """TOML text that loads back to an equal configuration, every default written out."""
    import tomli_w

    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def dropped(path: str | Path, overrides: Sequence[str] = ()) -> list[str]:
    """What is written and not used, since a later layer names another optimizer, engine or the like; a line each."""
    lines: list[str] = []
    _merge_all(_layers(Path(path), overrides), lines)
    return lines


def _layers(path: Path, overrides: Sequence[str]) -> list[Layer]:
    return [*read_layers(path), Layer("--set", parse_overrides(overrides))]


def load_layers(layers: Sequence[Layer], title: str) -> RunConfig:
    """The configuration of a run, from sources that were read; the ones that win last.

    Raises:
        Mistakes: with every one.
    """
    return _of_layers(RunConfig, layers, title)


def _load(model: type[M], path: Path, overrides: Sequence[str]) -> M:
    return _of_layers(model, _layers(path, overrides), str(path))


def _of_layers(model: type[M], layers: Sequence[Layer], title: str) -> M:
    problems = _nothing_to_unset(layers)

    def origin(where: mistakes.Path) -> str | None:
        found = (layer.name for layer in reversed(layers) if where and _contains(layer.values, where))
        name = next(found, title)
        return None if name == title else name

    values = _merge_all(layers, [])
    config = curve = None
    try:
        config = mistakes.validate(model, values, title, origin=origin)
    except mistakes.Mistakes as error:
        problems += error.problems
    table = values.get("schedule", {})
    if model is RunConfig and isinstance(table, dict):
        try:
            curve = schedule(without_silence(table), title, origin)
        except mistakes.Mistakes as error:
            problems += error.problems
    if problems or config is None:
        raise mistakes.Mistakes(title, list(dict.fromkeys(problems)))
    if curve is not None:  # its defaults too, so that a run's folder holds every value
        written = {"name": curve.name, **curve.model_dump(mode="json")}
        config = config.model_copy(update={"schedule": Component.model_validate(written)})
    return config


def _nothing_to_unset(layers: Sequence[Layer]) -> list[str]:
    """Keys that are to be unset, and that no earlier layer sets: most likely misspelt."""
    problems: list[str] = []
    for place, layer in enumerate(layers):
        for where in _unset(layer.values):
            if not any(_contains(below.values, where) for below in layers[:place]):
                problems.append(
                    f"{'.'.join(map(str, where))}: is set nowhere, so there is nothing to unset (in {layer.name})"
                )
    return problems


def _unset(values: Table, where: mistakes.Path = ()) -> Iterator[mistakes.Path]:
    for key, value in values.items():
        if value is UNSET:
            yield (*where, key)
        elif isinstance(value, dict):
            yield from _unset(cast("Table", value), (*where, key))


def _merge_all(layers: Sequence[Layer], lost: list[str]) -> Table:
    merged: Table = {}
    for layer in layers:
        merged = merge(merged, layer.values, lost)
    return _without_unset(merged)


def _without_unset(values: Table) -> Table:
    return {
        key: _without_unset(cast("Table", value)) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not UNSET
    }


@cache
def _once(path: Path) -> str:
    """The text of a pipe, which can be read only once."""
    return path.read_text(encoding="utf-8-sig")


def read_layers(path: Path, above: tuple[Path, ...] = ()) -> list[Layer]:
    """A file and all that it builds on, the ones that win last.

    Raises:
        ConfigError: a file is missing or not TOML, or builds on itself.
    """
    chain = (*above, path.resolve())
    if path.resolve() in above:
        raise ConfigError("base files go in a circle: " + " -> ".join(str(p) for p in chain))
    try:
        values = tomllib.loads(_once(path) if path.is_fifo() else path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        named_by = f", which {above[-1]} names as its base" if above else ""
        raise ConfigError(f"cannot read {path}{named_by}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    bases = values.pop("base", [])
    if not isinstance(bases, list) or not all(isinstance(b, str) for b in cast("list[object]", bases)):
        raise ConfigError(f'{path}: base must be a list of files, like base = ["../base/vit.toml"]')
    gone = values.pop("unset", [])
    if not isinstance(gone, list) or not all(isinstance(key, str) for key in cast("list[object]", gone)):
        raise ConfigError(f'{path}: unset must be a list of keys, like unset = ["optimizer.clip"]')
    layers = [layer for b in cast("list[str]", bases) for layer in read_layers(path.parent / b, chain)]
    if gone:
        layers.append(Layer(str(path), reduce(merge, (nested(key, UNSET) for key in cast("list[str]", gone)))))
    return [*layers, Layer(str(path), values)]


def merge(below: Table, above: Table, lost: list[str] | None = None, where: str = "") -> Table:
    """``above`` over ``below``, table by table; where a table names something else, with what that has too.

    Args:
        below: what was read first.
        above: what wins.
        lost: takes up a line for each setting that is dropped.
        where: of the tables.
    """
    merged = dict(below)
    for key, value in above.items():
        old = below.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            old, value, path = cast("Table", old), cast("Table", value), f"{where}{key}"
            before = old.get("name", _UNNAMED.get(path))
            name = value.get("name", before)
            if before is not None and name is not UNSET and name != before:
                kept = {k: v for k, v in old.items() if k != "name" and k in settings_of(path, str(name))}
                gone = sorted(old.keys() - kept.keys() - value.keys() - {"name"})
                if lost is not None and gone:
                    lost.append(f"{path}.name is {name!r}, so these of {before!r} are dropped: {', '.join(gone)}")
                old = kept
            merged[key] = merge(old, value, lost, f"{path}.")
        else:
            merged[key] = value
    return merged


def settings_of(table: str, name: str) -> set[str]:
    """Keys beside the name that a table may have, as far as that can be known without the component itself."""
    if table == "optimizer":
        return set(Optimizer.model_fields) - FOREIGN.get(name, set())
    if table == "engine":
        return set(EngineConfig.model_fields) - ({"zero"} if name == "accelerate" else set())
    if table == "schedule" and name in registry.names(SCHEDULES):
        return set(registry.module(SCHEDULES, name).Config.model_fields)
    return set()


def nested(key: str, value: Any) -> Table:
    """A value under the whole name of a setting, as tables."""
    return reduce(lambda inner, k: {k.strip(): inner}, reversed(key.split(".")), value)


def parse_overrides(overrides: Iterable[str]) -> Table:
    """``["optimizer.lr=1e-3", "objective.name=mae"]`` as nested tables; a bare word is text, nothing is :data:`UNSET`.

    Raises:
        Mistakes: with every override that cannot be read.
    """
    merged: Table = {}
    problems: list[str] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        keys = [k.strip() for k in key.split(".")]
        if not equals or not all(keys):
            problems.append(f"cannot read {override!r}; write it like optimizer.lr=1e-3")
            continue
        try:
            value = parse_value(text) if text.strip() else UNSET
        except ValueError as error:
            problems.append(f"cannot read {override!r}: {error}")
            continue
        merged = merge(merged, nested(key, value))
    if problems:
        raise mistakes.Mistakes("--set", problems)
    return merged


def parse_value(text: str) -> Any:
    """A TOML value, or the text itself when it is not one: ``3``, ``[1, 2]``, ``"90ep"`` and ``90ep``.

    Raises:
        ValueError: it begins like a list, a table or a quoted text, but is none.
    """
    text = text.strip()
    try:
        parsed = tomllib.loads(f"value = {text}")
    except ValueError as error:
        if text[:1] in ("[", "{", '"', "'"):
            raise ValueError(f"not a TOML value ({error})") from error
        return text
    # A date (2026-01-31) may well be the name of a folder, and nothing in a configuration is a date.
    value: Any = parsed["value"]
    return text if len(parsed) > 1 or isinstance(value, date | time) else value


def _contains(values: Any, where: mistakes.Path) -> bool:
    for key in where:
        if not mistakes.holds(values, key):
            return False
        values = values[key]
    return True
