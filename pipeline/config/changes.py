"""What of a run's configuration may differ between two of its starts, and what may not.

A run goes on from a checkpoint, which holds the configuration that it was trained with so far. Every difference from
that one falls under a rule of :data:`RULES`: it says how the run is done, or changes its course from here on, and is
taken and kept in ``provenance.json``; or it makes another experiment of it, or cannot be taken over at all.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache, reduce
from itertools import accumulate
from typing import Any, Literal, cast

from pipeline.core.errors import ConfigError

Rule = Literal["how", "course", "experiment", "never"]
"""How the run is done; its course from here on; another experiment, unless ``run.change`` names it; never."""

_TABLES = re.compile(r"^(?=\[)", re.MULTILINE)
_TABLE = re.compile(r"\[([\w.-]+)\]\n", re.ASCII)
_TOGETHER = ("[[", '["', "['", "[ ", '"""', "'''")
"""Where one of these stands, tables are not looked at one by one."""

RULES: tuple[tuple[str, Rule], ...] = (
    ("run.folder", "how"),
    ("run.keep", "how"),
    ("run.keep_every", "how"),
    ("run.keep_optimizer", "how"),
    ("run.change", "how"),
    ("run.length", "course"),
    ("run.seed", "never"),  # the order of samples, and what is drawn for each
    ("run.global_batch", "never"),
    ("data.train", "how"),  # that it is the same data, the stream knows
    ("data.keep", "how"),  # and which samples, too
    ("data.where", "how"),
    ("data.held_out", "how"),
    ("data.by_label", "how"),
    ("data.sidecar", "how"),
    ("data.lanes", "how"),  # left out, it means what the stream has chosen; that knows
    ("data.window", "never"),
    ("data.tail", "never"),
    ("data.workers", "how"),
    ("data.read_mb", "how"),
    ("data.cache", "how"),
    ("data.decode", "how"),
    ("data.max_bad", "how"),
    ("data.captions.tokenizer", "how"),  # that it is the same one, the stream knows
    ("data.beside.*.path", "how"),
    ("data.beside.*.ratio", "never"),
    ("objective.name", "never"),
    ("objective.weights", "how"),  # where it began; the checkpoint holds what has become of that
    ("objective.checkpointing", "how"),
    ("objective.compile", "how"),
    ("objective.share", "how"),
    ("objective.sampler", "how"),  # of pictures
    ("objective.feature_*", "how"),  # of evaluations
    ("optimizer.name", "never"),  # its state is of another kind
    ("optimizer", "course"),
    ("phases", "course"),
    ("phases.*.optimizer.name", "never"),
    ("schedule", "course"),
    ("engine", "how"),
    ("engine.precision", "course"),
    ("ema", "course"),
    ("start", "how"),  # where it began; the checkpoint holds what has become of that
    ("every", "how"),
    ("online", "how"),
    ("record", "how"),
)
"""Settings, with what lies below them, and the rule for each; the longest that fits holds. Others are "experiment"."""
ABSENT = "absent"


@dataclass(frozen=True)
class Change:
    """A setting that is not what it was."""

    key: str
    before: Any
    now: Any
    rule: Rule

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r}, now {self.now!r}"


def rule_of(key: str) -> Rule:
    """The rule for a setting, ``"optimizer.lr"``."""
    otherwise: tuple[str, Rule] = ("", "experiment")
    return max((r for r in RULES if _covers(r[0], key)), key=lambda rule: len(rule[0]), default=otherwise)[1]


def _covers(pattern: str, key: str) -> bool:
    return fnmatchcase(key, pattern) or fnmatchcase(key, f"{pattern}.*")


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """All differences of two configurations, as plain nested values."""
    old, new = flat(before), flat(now)
    return [
        Change(key, old.get(key, ABSENT), new.get(key, ABSENT), rule_of(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key, ABSENT) != new.get(key, ABSENT)
    ]


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested tables as one: ``{"optimizer": {"lr": 1e-3}}`` is ``{"optimizer.lr": 1e-3}``."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(cast("dict[str, Any]", value), f"{above}{name}.")
        else:
            found[above + name] = value
    return found


def flat_toml(text: str) -> dict[str, Any]:
    """As ``flat(tomllib.loads(text))``, and many times as fast where many texts have most of their tables in common.

    Each table is parsed by itself, and once. What might be no TOML, or another one, when it is put together, is parsed
    as a whole: arrays of tables, names in quotes, texts over several lines, a table that is also a value.

    Raises:
        ValueError: it is no TOML.
    """
    parts = _TABLES.split(text)
    names = [match[1] if (match := _TABLE.match(part)) else "" for part in parts]
    if len(set(names)) == len(names) and not any(mark in text for mark in _TOGETHER):
        try:
            tables = [_flat_table(part, name) for part, name in zip(parts, names, strict=True)]
        except ValueError:  # a line in the middle of an array began with a bracket; or it is no TOML, which is told
            return flat(tomllib.loads(text))
        own = frozenset[str]().union(*(keys for keys, _ in tables))
        if own.isdisjoint(above for name in names for above in _and_above(name)):
            return {name: value for _, table in tables for name, value in table.items()}
    return flat(tomllib.loads(text))


def _and_above(name: str) -> list[str]:
    """Of "a.b.c": "a", "a.b" and "a.b.c"."""
    return list(accumulate(name.split("."), "{}.{}".format))


@lru_cache(maxsize=4096)
def _flat_table(text: str, table: str) -> tuple[frozenset[str], dict[str, Any]]:
    """Whole names of a table's own keys, and its values by their whole names."""
    found = tomllib.loads(text)
    inner: dict[str, Any] = reduce(lambda above, key: above[key], table.split("."), found) if table else found
    return frozenset(f"{table}.{key}" if table else key for key in inner), flat(found)


def refuse(found: Sequence[Change], allowed: Sequence[str], title: str, trained: str) -> None:
    """Do not go on with a run as what it was not.

    Args:
        found: the changes.
        allowed: ``run.change``: settings, or tables of them, that may make another experiment of it.
        title: what the configuration is called in a message.
        trained: what was trained, in a message: "step 40 of runs/x".

    Raises:
        ConfigError: with all changes that may not be.
    """
    never = [c for c in found if c.rule == "never"]
    others = [c for c in found if c.rule == "experiment" and not any(_covers(name, c.key) for name in allowed)]
    if not never and not others:
        return
    lines = [f"  {change}" for change in (*never, *others)]
    advice = "set it back, or set run.folder for a new run"
    if not never:
        keys = ", ".join(f'"{c.key}"' for c in others)
        advice += f"; to go on with this one all the same: run.change = [{keys}]"
    raise ConfigError("\n".join([f"{title} is not what {trained} was trained with:", *lines, advice]))
