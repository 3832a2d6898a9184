"""``[sweep]``: a configuration of many runs, each another combination of settings, with a name of its own.

The rest of the file is what all runs have in common, as in any configuration; ``run.folder`` holds their folders::

    base = ["../demo/mae_glyphs.toml"]
    run.folder = "runs/sweeps/mask"

    [sweep]
    seeds = 3
    grid."objective.mask_ratio" = [0.5, 0.75]
    grid."optimizer.lr" = [1e-4, 3e-4]

No torch here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

from pydantic import Field, model_validator

from pipeline.config import load
from pipeline.config.changes import flat
from pipeline.config.mistakes import Mistakes, validate
from pipeline.config.schema import Positive, RunConfig, Strict, Text
from pipeline.core.errors import ConfigError

TABLE = "sweep"
SEED = "run.seed"
NAME = "name"
NAME_LETTERS = 150
"""Of a run's name; file systems take 255."""
MOST = 10_000
"""Runs of a sweep; more are a slip of the pen."""
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")
_SHOWN = 3
"""Runs that are named beside a mistake that several have."""


class Sweep(Strict):
    """Which runs there are: every entry of ``list`` with every combination of ``grid`` and every seed."""

    grid: dict[Text, Any] = Field(default_factory=dict)
    """Setting to its values: {"optimizer.lr" = [1e-4, 3e-4]}."""
    list: tuple[dict[Text, Any], ...] = ()
    """Settings that go together, a table for each run: [[sweep.list]]. ``name`` in it stands for them in the name, and
    ``{seed}`` in a text is the run's: ``"start.from" = "runs/source/seed={seed}"``; alone it is the number."""
    seeds: Positive | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    """How many, from 0, or which; left out: that of the configuration."""
    suite: Text | None = None
    """Of evaluations, for each run when it has finished; relative to the folder that the command runs in."""

    @model_validator(mode="after")
    def _has_values(self) -> Sweep:
        for key, values in flat(self.grid).items():
            if not isinstance(values, list) or not values:
                raise ValueError(f'grid: {key} needs a list of values, like grid."{key}" = [1, 2]')
            if key == SEED or key.startswith("run.folder"):
                raise ValueError(
                    f"grid: {key} is not for the grid; write seeds = 3, and name the runs by their settings"
                )
        if not self.grid and not self.list and self.seeds is None:
            raise ValueError("has no grid, no list and no seeds: nothing to vary")
        return self

    def numbers(self) -> Sequence[int]:
        """The seeds; none where the configuration says it."""
        return range(self.seeds) if isinstance(self.seeds, int) else self.seeds or ()


@dataclass(frozen=True)
class Variant:
    """One run of a sweep."""

    name: str
    """Of its folder: "lr=1e-4,seed=0"."""
    settings: Mapping[str, Any]
    """In which it differs, by their whole names."""
    config: RunConfig


@dataclass(frozen=True)
class Plan:
    """All runs of a sweep."""

    folder: Path
    """Holds theirs."""
    suite: str | None
    variants: Sequence[Variant]


def is_sweep(path: Path) -> bool:
    """Whether a configuration file, or what it builds on, has ``[sweep]``.

    Raises:
        ConfigError: it cannot be read.
    """
    return any(TABLE in layer.values for layer in load.read_layers(path))


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """All runs of a sweep, each one's configuration checked.

    Args:
        path: of the file.
        overrides: ``key.path=value``, for all runs; what the sweep varies wins over them.

    Raises:
        Mistakes: with those of all runs, each once.
    """
    title = str(path)
    layers = [*load.read_layers(path), load.Layer("--set", load.parse_overrides(overrides))]
    sweep = _sweep_of(layers, title)
    rest = [load.Layer(layer.name, _without(layer.values)) for layer in layers]
    chosen = list(_combinations(sweep))
    if len(chosen) > MOST:
        raise Mistakes(title, [f"sweep: has {len(chosen):,} runs; more than {MOST:,} are taken for a mistake"])
    names = _names(chosen)
    problems: dict[str, list[str]] = {}
    for name, count in Counter(names).items():
        if count > 1:
            problems[f"sweep: {count} runs are called {name!r}; remove the doubles, or give the list names"] = []
    variants: list[Variant] = []
    folder = _folder(rest)
    for name, (settings, _, _) in zip(names, chosen, strict=True):
        own = [load.Layer(f"the sweep, {name}", _nested(settings))]
        place = [load.Layer("the sweep", _nested({"run.folder": str(folder / name)}))] if folder else []
        try:
            variants.append(Variant(name, settings, load.load_layers([*rest, *own, *place], title)))
        except Mistakes as mistakes:
            for problem in mistakes.problems:
                problems.setdefault(problem.replace(f" (in the sweep, {name})", " (in the sweep)"), []).append(name)
    if problems or folder is None:
        raise Mistakes(title, told(problems, len(chosen)))
    return Plan(folder, sweep.suite, variants)


def told(problems: Mapping[str, Sequence[str]], runs: int) -> list[str]:
    """A line for each mistake, with the runs that have it, unless all have.

    Args:
        problems: to the names of runs; none: it is that of the sweep.
        runs: how many there are.
    """
    return [text if len(names) in (0, runs) else f"{_some(names)}: {text}" for text, names in problems.items()]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return " and ".join(names) if len(names) == 2 else ", ".join(names[:_SHOWN]) + more


def _sweep_of(layers: Sequence[load.Layer], title: str) -> Sweep:
    """What the files say of the sweep; the lists and grids of several files are put together key by key."""
    values: dict[str, Any] = {}
    for layer in layers:
        values = load.merge(values, layer.values.get(TABLE, {}))
    if not values:
        raise ConfigError(f"{title} has no [sweep]: to train it alone, `sluice train {title}`")
    return validate(Sweep, values, title, (TABLE,))


def _without(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != TABLE}


def _folder(layers: Sequence[load.Layer]) -> Path | None:
    """Where the runs lie; None where the files do not say it rightly, which every run's check says."""
    found = None
    for layer in layers:
        table = layer.values.get("run")
        found = cast("dict[str, Any]", table).get("folder", found) if isinstance(table, dict) else found
    return Path(found) if isinstance(found, str) and found else None


class _Combination(NamedTuple):
    """The settings of one run, and what it is called by."""

    settings: dict[str, Any]
    named: dict[str, Any]
    """Those that stand in its name."""
    title: str
    """Of its entry in the list; empty: it has none, and its settings stand in the name."""


def _combinations(sweep: Sweep) -> Iterator[_Combination]:
    """The settings of each run, in the order of the file: the seeds change first, then the grid's last key."""
    entries = [flat(entry) for entry in sweep.list] or [{}]
    grid = cast("dict[str, list[Any]]", flat(sweep.grid))
    seeds = [{SEED: seed} for seed in sweep.numbers()] or [{}]
    for entry, values, seed in itertools.product(entries, itertools.product(*grid.values()), seeds):
        title = str(entry.get(NAME, ""))
        own = {key: _of_seed(value, seed) for key, value in entry.items() if key != NAME}
        rest = dict(zip(grid, values, strict=True)) | seed
        yield _Combination(own | rest, rest if title else own | rest, title)


def _of_seed(value: Any, seed: Mapping[str, int]) -> Any:
    """A value of the list, ``{seed}`` in a text replaced by the run's, where the sweep has seeds."""
    if not seed or not isinstance(value, str):
        return value
    return seed[SEED] if value == "{seed}" else value.replace("{seed}", str(seed[SEED]))


def _nested(settings: Mapping[str, Any]) -> load.Table:
    table: load.Table = {}
    for key, value in settings.items():
        table = load.merge(table, load.nested(key, value))
    return table


def _names(chosen: Sequence[_Combination]) -> list[str]:
    """A folder's name for each combination: the last parts of the keys, as far as they tell keys apart."""
    keys = list(dict.fromkeys(key for combination in chosen for key in combination.named))
    short = {key: _ending(key, keys) for key in keys}
    return [_name(combination, short) for combination in chosen]


def _name(combination: _Combination, short: Mapping[str, str]) -> str:
    title = [value_name(combination.title)] if combination.title else []
    name = ",".join([*title, *(f"{short[key]}={value_name(value)}" for key, value in combination.named.items())])
    return name if len(name) <= NAME_LETTERS else f"{name[: NAME_LETTERS - 9]}~{_mark(name)}"


def _ending(key: str, keys: Sequence[str]) -> str:
    parts = key.split(".")
    endings = (".".join(parts[-size:]) for size in range(1, len(parts) + 1))
    return next(e for e in endings if all(other == key or not f".{other}".endswith(f".{e}") for other in keys))


def value_name(value: Any) -> str:
    """A value as a part of a folder's name: the same value always the same, and no two the same.

    Numbers are as short as they can be read back; of texts with other letters than ``A-Za-z0-9._+-``, and of tables, a
    part of their hash is added.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _float_name(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list):
        return "_".join(map(value_name, cast("list[Any]", value))) or "none"
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    plain = _UNSAFE.sub("-", text).strip("-.")[:40]
    return plain if plain == text else f"{plain}~{_mark(text)}"


def _float_name(value: float) -> str:
    """1e-4 and 0.25; the digits are those that tell it from every other float."""
    if value == 0 or not math.isfinite(value) or 1e-3 <= abs(value) < 1e6:
        return repr(value)
    digits, _, exponent = f"{value!r}".partition("e")
    if not exponent:  # 0.0001 is written so by Python
        digits, _, exponent = next(t for n in range(18) if float(t := f"{value:.{n}e}") == value).partition("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
