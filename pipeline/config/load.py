"""Reading a configuration: TOML files, the files they build on, and overrides from the command line.

``base = ["../base/vit.toml"]`` names files, relative to the one it stands in, that are read first; what comes later
wins, table by table. A table that changes its ``name`` replaces the earlier one whole, since the settings of one
objective, optimizer or engine mean nothing to another. All other paths stay as they are written: relative ones are
relative to the folder that the command runs in, and neither ``~`` nor ``$HOME`` is replaced.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from datetime import date, time
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from pydantic import BaseModel

from pipeline.config import mistakes
from pipeline.config.schema import RunConfig, SuiteConfig
from pipeline.core.errors import ConfigError

M = TypeVar("M", bound=BaseModel)
Table = dict[str, Any]


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


def _load(model: type[M], path: Path, overrides: Sequence[str]) -> M:
    layers = [*read_layers(path), Layer("--set", parse_overrides(overrides))]

    def origin(where: mistakes.Path) -> str | None:
        found = (layer.name for layer in reversed(layers) if where and _contains(layer.values, where))
        name = next(found, str(path))
        return None if name == str(path) else name

    values = reduce(merge, (layer.values for layer in layers), cast("Table", {}))
    return mistakes.validate(model, values, str(path), origin=origin)


def read_layers(path: Path, above: tuple[Path, ...] = ()) -> list[Layer]:
    """A file and all that it builds on, the ones that win last.

    Raises:
        ConfigError: a file is missing or not TOML, or builds on itself.
    """
    chain = (*above, path.resolve())
    if path.resolve() in above:
        raise ConfigError("base files go in a circle: " + " -> ".join(str(p) for p in chain))
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        named_by = f", which {above[-1]} names as its base" if above else ""
        raise ConfigError(f"cannot read {path}{named_by}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    bases = values.pop("base", [])
    if not isinstance(bases, list) or not all(isinstance(b, str) for b in cast("list[object]", bases)):
        raise ConfigError(f'{path}: base must be a list of files, like base = ["../base/vit.toml"]')
    layers = [layer for b in cast("list[str]", bases) for layer in read_layers(path.parent / b, chain)]
    return [*layers, Layer(str(path), values)]


def merge(below: Table, above: Table) -> Table:
    """``above`` over ``below``, table by table; a table with another ``name`` replaces."""
    merged = dict(below)
    for key, value in above.items():
        old = below.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            old, value = cast("Table", old), cast("Table", value)
            renamed = "name" in old and value.get("name", old["name"]) != old["name"]
            merged[key] = value if renamed else merge(old, value)
        else:
            merged[key] = value
    return merged


def parse_overrides(overrides: Iterable[str]) -> Table:
    """``["optimizer.lr=1e-3", "objective.name=mae"]`` as nested tables; a bare word is text.

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
            value = parse_value(text)
        except ValueError as error:
            problems.append(f"cannot read {override!r}: {error}")
            continue
        merged = merge(merged, reduce(lambda inner, k: {k: inner}, reversed(keys), value))
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
