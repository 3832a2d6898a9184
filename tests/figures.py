"""Figures in texts come from records, and not from a keyboard.

A record, ``tests/perf/records/figures/NAME.toml``, holds what was run (command, commit, date, hardware, seeds) and what
was seen. A text with places for figures, ``tests/perf/records/texts/NAME.md``, holds ``{record.figure}``; in a README
what stands between ``<!-- figures: NAME -->`` and ``<!-- end of figures -->``, in a configuration between ``# figures:
NAME`` and ``# end of figures``, is that text with its figures filled in. A test fails where it is not.

  python -m tests.figures                 # fill in all texts, and all tables (tests/tables.py)
  python -m tests.figures run NAME        # run the record's command again, and take over what it prints
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import tomli_w

from tests import tables
from tests.records import ORIGIN, ROOT, RecordError, commit_now, hardware

RECORDS = ROOT / "tests" / "perf" / "records" / "figures"
TEXTS = ROOT / "tests" / "perf" / "records" / "texts"
WRITTEN = ("*.md", "configs/**/*.toml", "*/README.md", "configs/*/README.md")
"""Where texts with figures may stand, below the project's folder."""
PARTS = {"value", "spread", "low", "high", "unit", "digits", "pattern"}
PLACE = re.compile(r"\{(\w+)\.(\w+)(?::(\w+))?\}")
BLOCK = re.compile(
    r"(?P<open>^(?:<!-- figures: (?P<name>\w+) -->|# figures: (?P<comment>\w+))\n)(?P<body>.*?)"
    r"(?P<close>^(?:<!-- end of figures -->|# end of figures)$)",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Figure:
    """One number and how it is shown."""

    value: float
    spread: float | None = None
    """Standard error."""
    low: float | None = None
    high: float | None = None
    """Range over repeats."""
    unit: str = ""
    digits: int | None = None
    """After the decimal point; left out: as many as the value is written with."""
    pattern: str | None = None
    """Finds it in what the command prints: a regular expression with the group "value", perhaps "low" and "high"."""

    def number(self, value: float) -> str:
        """With as many digits as the value itself, thousands set apart."""
        if value and abs(value) < 1e-4:
            return f"{value:.0e}".replace("e-0", "e-")
        digits = self.digits
        if digits is None:
            digits = 0 if isinstance(self.value, int) else len(repr(float(self.value)).partition(".")[2])
        return f"{value:,.{digits}f}"

    def show(self, how: str | None) -> str:
        """The value, its unit and its standard error.

        ``how``: with "range" the range is in place of the error, with "alone" neither; "bare" is the number without its
        unit, "low" the least.
        """
        text = self.number(self.value)
        if how == "bare":
            return text
        text += f" {self.unit}" if self.unit else ""
        if how == "alone":
            return text
        if how in ("range", "low"):
            if self.low is None or self.high is None:
                raise RecordError("it has no range: 'low' and 'high'")
            if how == "low":
                return self.number(self.low)
            return f"{text} ({self.number(self.low)} to {self.number(self.high)})"
        if how is not None:
            raise RecordError(f"there is no way {how!r} to show a figure: 'range', 'alone', 'bare' or 'low'")
        return text if self.spread is None else f"{text} +- {self.number(self.spread)}"


def read_record(path: Path) -> tuple[dict[str, Any], dict[str, Figure]]:
    """Origin and figures of a record.

    Raises:
        RecordError: something of its origin is missing, or a figure has parts that none has.
    """
    body = tomllib.loads(path.read_text(encoding="utf-8"))
    figures = body.pop("figures", {})
    wrong = [key for key, kind in ORIGIN.items() if not isinstance(body.get(key), kind) or body.get(key) == ""]
    if wrong or body.keys() - ORIGIN or not figures:
        raise RecordError(f"{path.name}: it needs figures and {', '.join(ORIGIN)}, and nothing else; see {wrong}")
    for name, parts in figures.items():
        if parts.keys() - PARTS or "value" not in parts:
            raise RecordError(f"{path.name}: figure {name} has {', '.join(parts)}; it may have {', '.join(PARTS)}")
    return body, {name: Figure(**parts) for name, parts in figures.items()}


def records(folder: Path = RECORDS) -> dict[str, dict[str, Figure]]:
    """All figures, by record."""
    return {path.stem: read_record(path)[1] for path in sorted(folder.glob("*.toml"))}


def fill(text: str, known: Mapping[str, Mapping[str, Figure]]) -> str:
    """The text with its figures.

    Raises:
        RecordError: it asks for a figure that is not there, or cannot be shown so.
    """

    def shown(place: re.Match[str]) -> str:
        record, name, how = place.groups()
        try:
            return known[record][name].show(how)
        except KeyError:
            there = ", ".join(f"{r}.{n}" for r, names in known.items() for n in names)
            raise RecordError(f"no figure {record}.{name}; there are {there}") from None
        except RecordError as error:
            raise RecordError(f"{record}.{name}: {error}") from None

    return PLACE.sub(shown, text)


def written(root: Path = ROOT) -> Iterator[Path]:
    """Files that hold blocks of figures."""
    for path in sorted({p for pattern in WRITTEN for p in root.glob(pattern)}):
        if BLOCK.search(path.read_text(encoding="utf-8")):
            yield path


def renewed(text: str, known: Mapping[str, Mapping[str, Figure]], texts: Path = TEXTS) -> str:
    """A file's text with all its blocks filled in anew."""

    def block(found: re.Match[str]) -> str:
        comment = found["comment"] is not None
        path = texts / f"{found['comment'] or found['name']}.md"
        if not path.exists():
            raise RecordError(f"there is no text {path.name} for a block of figures")
        body = fill(path.read_text(encoding="utf-8"), known)
        if comment:
            body = "".join(f"# {line}\n" for line in body.split("\n")[:-1])
        return found["open"] + body + found["close"]

    return BLOCK.sub(block, text)


def taken_over(figures: Mapping[str, Figure], output: str) -> dict[str, dict[str, Any]]:
    """What a command printed, as parts of its record's figures.

    Raises:
        RecordError: a figure has no pattern, or it is not found.
    """
    found = {}
    for name, figure in figures.items():
        match = re.search(figure.pattern, output, re.MULTILINE) if figure.pattern else None
        if match is None:
            raise RecordError(f"figure {name}: pattern {figure.pattern!r} finds nothing in what the command printed")
        numbers = {part: text.replace(",", "") for part, text in match.groupdict().items() if text is not None}
        parts: dict[str, Any] = {part: float(t) if "." in t else int(t) for part, t in numbers.items()}
        kept = {"unit": figure.unit, "digits": figure.digits, "pattern": figure.pattern}
        found[name] = parts | {part: value for part, value in kept.items() if value}
    return found


def run_again(name: str) -> None:
    """Run a record's command and renew the record."""
    path = RECORDS / f"{name}.toml"
    origin, figures = read_record(path)
    origin |= {"commit": commit_now(), "date": date.today(), "hardware": hardware()}
    command = origin["command"].replace("python ", f"{sys.executable} ", 1)
    ended = subprocess.run(["bash", "-c", command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    print(ended.stdout)
    path.write_text(tomli_w.dumps(origin | {"figures": taken_over(figures, ended.stdout)}), encoding="utf-8")


def main() -> int:
    """Fill in texts, after a run if one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="*", metavar="run NAME", help="run the commands of these records first")
    words = parser.parse_args().run
    if words and words[0] != "run":
        parser.error("the only word is 'run', then names of records")
    try:
        for name in words[1:]:
            run_again(name)
        known = records()
        for path in sorted({*written(), *tables.written()}):
            text = path.read_text(encoding="utf-8")
            if (new := tables.renewed(renewed(text, known))) != text:
                path.write_text(new, encoding="utf-8")
                print(f"{path.relative_to(ROOT)}: renewed")
    except (RecordError, FileNotFoundError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
