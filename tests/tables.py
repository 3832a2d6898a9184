"""Tables of sweeps come from records too: methods by seeds, with paired intervals against one of the methods.

A record, ``tests/perf/records/tables/NAME.toml``, holds where its figures come from (see :mod:`tests.figures`), which
columns there are, and of each row what every seed gave. In a README the table stands between ``<!-- table: NAME -->``
and ``<!-- end of table -->``; ``python -m tests.figures`` writes it, and a test fails where it is another::

    command = "sluice sweep configs/sweep/mine.toml"
    commit = "1a2b3c4"
    date = 2026-11-30
    hardware = "two cores of an Intel Xeon"
    seeds = 3
    baseline = "alone"                  # a row; left out: nothing is compared

    [[columns]]
    name = "knn/top1"                   # as `sluice runs` calls it, or what a script writes
    title = "kNN, %"
    scale = 100.0                       # left out: 1
    digits = 1
    compared = true                     # against the baseline, seed by seed; left out: false
    run = "/10"                         # left out: none. Of runs whose names end so, after the row's: "kl/10,seed=0"

    [[columns]]
    title = "mean"
    mean = ["10 labels", "20 labels"]   # titles of columns: their mean, seed by seed

    [rows."KL, T = 4"]                  # the row's title
    run = "kl"                          # left out: the title. Of the sweep's runs, without the seed: "kl,seed=0"
    note = "Hinton et al."              # left out: none. In a column of its own

    [rows."KL, T = 4".values]           # written by:  python -m tests.tables NAME runs/sweep/mine, or a folder above
    "knn/top1" = [0.61, 0.62, 0.60]     # of seed 0, 1, 2; nan: not there. A number alone: the same for all seeds

Differences are means over seeds of the row less the baseline with the same seed, with Student's interval of 95 %; bold
where it does not hold nought. They tell what other seeds would give on the same test samples.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from pipeline.record import statistics as intervals
from pipeline.record.runs import read_run
from tests.records import ORIGIN, ROOT, RecordError, commit_now

FOLDER = ROOT / "tests" / "perf" / "records" / "tables"
BLOCK = re.compile(
    r"(?P<open>^<!-- table: (?P<name>\w+) -->\n)(?P<body>.*?)(?P<close>^<!-- end of table -->$)",
    re.MULTILINE | re.DOTALL,
)
SEED = re.compile(r"^(?P<run>.*?)(?:(?:[,/]|^)seed=(?P<seed>\d+))?$")
Values = dict[str, float | list[float]]


@dataclass(frozen=True)
class Column:
    """One metric, and how it is shown."""

    name: str = ""
    title: str = ""
    scale: float = 1.0
    digits: int = 1
    compared: bool = False
    run: str = ""
    mean: Sequence[str] = ()

    @property
    def key(self) -> str:
        """What a row's values are called by."""
        return self.name + self.run

    def number(self, value: float, *, sign: bool = False) -> str:
        """To the column's digits, thousands set apart."""
        return f"{value * self.scale:{'+' if sign else ''},.{self.digits}f}"


@dataclass(frozen=True)
class Row:
    """One method."""

    title: str
    values: Values
    """Of each column by its name: one for each seed, or one for all."""
    run: str = ""
    note: str = ""

    def seeds(self, column: Column, columns: Sequence[Column]) -> list[float]:
        """What each seed gave, in one of the table's columns; NaN where it is not there."""
        if column.mean:
            parts = [self.seeds(other, columns) for other in columns if other.title in column.mean]
            together = zip(*parts, strict=True) if len({len(part) for part in parts}) == 1 else ()
            return [statistics.fmean(values) for values in together]
        found = self.values.get(column.key, [])
        return found if isinstance(found, list) else [found]


@dataclass(frozen=True)
class Table:
    """A whole record."""

    origin: Mapping[str, Any]
    columns: Sequence[Column]
    rows: Sequence[Row]
    baseline: str | None = None
    head: str = field(default="")
    """Title of the first column."""


def read_table(path: Path) -> Table:
    """A record.

    Raises:
        RecordError: it does not say where its figures come from, or holds what none has.
    """
    body = tomllib.loads(path.read_text(encoding="utf-8"))
    columns, rows = body.pop("columns", []), body.pop("rows", {})
    baseline, head = body.pop("baseline", None), body.pop("head", "")
    wrong = [key for key, kind in ORIGIN.items() if not isinstance(body.get(key), kind) or body.get(key) == ""]
    if wrong or body.keys() - ORIGIN or not columns or not rows:
        raise RecordError(
            f"{path.name}: it needs columns, rows and {', '.join(ORIGIN)}, and may have baseline and head; see "
            f"{[*wrong, *(body.keys() - ORIGIN)]}"
        )
    try:
        table = Table(
            body,
            [Column(**column) for column in columns],
            [Row(title, **{"values": {}} | row) for title, row in rows.items()],
            baseline,
            head,
        )
    except TypeError as error:
        raise RecordError(f"{path.name}: {error}") from None
    _check(path.name, table)
    return table


def _check(name: str, table: Table) -> None:
    titles, known = [row.title for row in table.rows], [column.key for column in table.columns if not column.mean]
    if table.baseline is not None and table.baseline not in titles:
        raise RecordError(f"{name}: no row is called {table.baseline!r}, the baseline; there are {titles}")
    if table.baseline is None and any(column.compared for column in table.columns):
        raise RecordError(f"{name}: a column is compared, and no row is the baseline")
    heads = [column.title for column in table.columns if not column.mean]
    for column in table.columns:
        if bool(column.name) == bool(column.mean) or set(column.mean) - set(heads) or not column.title:
            raise RecordError(f"{name}: a column has a title, and a name or the mean of others of {heads}: {column}")
    for row in table.rows:
        for column, values in row.values.items():
            if column not in known:
                raise RecordError(f"{name}: {row.title} has {column!r}; the columns are {known}")
            if isinstance(values, list) and len(values) != table.origin["seeds"]:
                raise RecordError(f"{name}: {row.title}: {len(values)} of {column!r}, not {table.origin['seeds']}")


def shown(table: Table) -> str:
    """The table as Markdown, and below it where it comes from."""
    notes = any(row.note for row in table.rows)
    heads, marks = [table.head], ["---"]
    for column in table.columns:
        heads.append(column.title)
        marks.append("--:")
        if column.compared:
            heads.append(f"less {table.baseline}")
            marks.append("--:")
    if notes:
        heads.append("")
        marks.append("---")
    base = next((row for row in table.rows if row.title == table.baseline), None)
    lines = [[row.title, *_cells(table.columns, row, base), *([row.note] if notes else [])] for row in table.rows]
    parts = ["| " + " | ".join(cells) + " |" for cells in (heads, *lines)]
    parts.insert(1, "|" + "|".join(marks) + "|")
    return "\n".join([*parts, "", _origin(table), ""])


def _cells(columns: Sequence[Column], row: Row, base: Row | None) -> list[str]:
    found: list[str] = []
    for column in columns:
        own = row.seeds(column, columns)
        found.append(_mean(column, own))
        if column.compared:
            assert base is not None
            found.append("" if row is base else _difference(column, base.seeds(column, columns), own))
    return found


def _mean(column: Column, values: Sequence[float]) -> str:
    """Mean over seeds, and its standard error."""
    there = [value for value in values if math.isfinite(value)]
    if not there:
        return "-"
    mean = intervals.seeds_alone(there, [None] * len(there))
    text = column.number(mean.value) + (f" +- {column.number(mean.error)}" if len(there) > 1 else "")
    return text if len(there) == len(values) else f"{text} ({len(there)} of {len(values)} seeds)"


def _difference(column: Column, first: Sequence[float], second: Sequence[float]) -> str:
    """Second minus first with the interval of the pairs; bold where that does not hold nought."""
    count = max(len(first), len(second))  # one of a row that has the same for all seeds stands for each
    first, second = ([*side] * (count if len(side) == 1 else 1) for side in (first, second))
    pairs = [(a, b) for a, b in zip(first, second, strict=False) if math.isfinite(a) and math.isfinite(b)]
    if not pairs:
        return "-"
    if len(pairs) == 1:
        return column.number(pairs[0][1] - pairs[0][0], sign=True)
    found = intervals.seeds_unpaired([(a, None) for a, _ in pairs], [(b, None) for _, b in pairs])
    low, high = (column.number(end, sign=True) for end in (found.low, found.high))
    text = f"{column.number(found.value, sign=True)} [{low}, {high}]"
    return f"**{text}**" if found.low > 0 or found.high < 0 else text


def _origin(table: Table) -> str:
    origin = table.origin
    seeds = f"{origin['seeds']} seeds, +- standard error over them" if origin["seeds"] > 1 else "one seed"
    compared = (
        f" Differences are paired by seed, with Student's interval of {intervals.LEVEL:.0%}; bold: without nought."
        if any(column.compared for column in table.columns) and origin["seeds"] > 1
        else ""
    )
    return (
        f"`{origin['command']}` at {origin['commit']}, {origin['date'].isoformat()}, {origin['hardware']}; {seeds}."
        f"{compared}"
    )


def renewed(text: str, folder: Path = FOLDER) -> str:
    """A file's text with all its tables written anew.

    Raises:
        RecordError: a table has no record, or that is not sound.
    """

    def block(found: re.Match[str]) -> str:
        path = folder / f"{found['name']}.toml"
        if not path.exists():
            raise RecordError(f"there is no record {path.name} for a table")
        return found["open"] + shown(read_table(path)) + found["close"]

    return BLOCK.sub(block, text)


def written(root: Path = ROOT) -> list[Path]:
    """Files that hold tables."""
    paths = {*root.glob("*.md"), *root.glob("*/README.md"), *root.glob("configs/*/README.md")}
    return [path for path in sorted(paths) if BLOCK.search(path.read_text(encoding="utf-8"))]


def collected(table: Table, folders: Sequence[Path]) -> Table:
    """The table with what a sweep's runs gave: of each row and seed what the columns name.

    Args:
        table: its rows and columns say what is looked for.
        folders: of the sweeps; the runs lie below. What a later one has takes the place of an earlier one's. A run
            whose name tells no seed stands for all seeds, as a teacher that several students follow.

    Raises:
        RecordError: a row has no run.
    """
    runs: dict[tuple[str, int | None], Path] = {}
    for folder in folders:
        for path in sorted(path.parent for path in folder.rglob("metrics.jsonl")):
            name = SEED.match(str(path.relative_to(folder)))
            assert name is not None
            runs[name["run"], None if name["seed"] is None else int(name["seed"])] = path
    rows: list[Row] = []
    for row in table.rows:
        found = {
            column.key: _of_runs(runs, (row.run or row.title) + column.run, column.name, table.origin["seeds"])
            for column in table.columns
            if not column.mean
        }
        measured = {key: values for key, values in found.items() if not np.isnan(values).all()}
        if not measured and not row.values:
            there = ", ".join(sorted({name for name, _ in runs})) or "none"
            raise RecordError(f"{row.title}: no run called {row.run or row.title!r} has the columns; there are {there}")
        rows.append(Row(row.title, dict(row.values) | measured, row.run, row.note))
    return Table(table.origin, table.columns, rows, table.baseline, table.head)


def _of_runs(runs: Mapping[tuple[str, int | None], Path], name: str, metric: str, seeds: int) -> float | list[float]:
    """What each seed's run gave, or the one run for all; NaN where it is not there."""

    def of(path: Path | None) -> float:
        return math.nan if path is None else float(read_run(path, settings=False).values.get(metric, math.nan))

    if (name, None) in runs:
        return of(runs[name, None])
    return [of(runs.get((name, seed))) for seed in range(seeds)]


def write_table(path: Path, table: Table) -> None:
    """Write a record as of today and of the present commit; what stands in the file by default is left out."""
    origin = dict(table.origin) | {"commit": commit_now(), "date": date.today()}
    body: dict[str, Any] = origin
    body |= {key: value for key, value in (("baseline", table.baseline), ("head", table.head)) if value}
    body["columns"] = [_without_defaults(column) for column in table.columns]
    body["rows"] = {row.title: {k: v for k, v in vars(row).items() if v and k != "title"} for row in table.rows}
    path.write_text(tomli_w.dumps(body), encoding="utf-8")


def _without_defaults(column: Column) -> dict[str, Any]:
    plain = vars(Column())
    return {key: value for key, value in vars(column).items() if value != plain[key]}


def main() -> int:
    """Take over what runs gave into a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the record, which has rows and columns already")
    parser.add_argument("folders", nargs="+", type=Path, help="of sweeps, in which the runs lie")
    asked = parser.parse_args()
    path = FOLDER / f"{asked.name}.toml"
    try:
        table = collected(read_table(path), asked.folders)
    except (RecordError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    write_table(path, table)
    print(shown(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
