"""How good a run has become, by one metric: ``quality.json``, from which the best step follows, and when to stop.

Steps that are done again replace their values, and those that were given up are forgotten, so that what follows does
not depend on kills.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.core.errors import DataError
from pipeline.core.files import replace_file
from pipeline.record.files import dumps, number
from pipeline.record.found import Row

FILE = "quality.json"
Better = Literal["higher", "lower"]


@dataclass
class Quality:
    """The values of one metric so far."""

    metric: str
    better: Better = "higher"
    values: dict[int, float] = field(default_factory=dict[int, float])
    """By step."""

    @property
    def best(self) -> int | None:
        """The step of the best value, of equal ones the first; None: there is none yet."""
        finite = {step: value for step, value in sorted(self.values.items()) if math.isfinite(value)}
        if not finite:
            return None
        return (max if self.better == "higher" else min)(finite, key=lambda step: finite[step])

    @property
    def without_gain(self) -> int:
        """Values since the best one."""
        best = self.best
        return 0 if best is None else sum(step > best for step in self.values)

    def add(self, step: int, value: float, better: Better) -> None:
        """Take in the value of a step; what lies after it was given up."""
        self.values = {known: old for known, old in self.values.items() if known < step} | {step: value}
        self.better = better

    def write(self, folder: Path) -> None:
        """Keep it in a run's folder."""
        values = [[step, value] for step, value in sorted(self.values.items())]
        body = {"metric": self.metric, "better": self.better, "best": self.best, "values": values}
        replace_file(folder / FILE, dumps(body, indent=1).encode() + b"\n")


def read_quality(folder: Path, metric: str, step: int) -> Quality:
    """What was kept of a metric up to a step; nothing, if it was another one.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / FILE
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if body["metric"] != metric:
            return Quality(metric)
        values = {int(at): float(number(value)) for at, value in body["values"] if int(at) <= step}
        return Quality(metric, body["better"], values)
    except FileNotFoundError:
        return Quality(metric)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); remove it, and the best is looked for anew") from error


def value_of(metric: str, rows: Sequence[Row]) -> Row | None:
    """The one number of that name, "knn/top1_k20", or on one of several data sets, "cifar10/knn/top1_k20".

    None: there is none, or more than one.
    """
    named = [row for row in rows if metric in (row.metric, f"{row.data_name}/{row.metric}")]
    return named[0] if len(named) == 1 else None
