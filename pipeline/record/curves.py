"""Metrics against samples, thinned, as small charts of plain HTML and SVG that scale to any width and colour scheme.

The SVG holds shapes only and is stretched to its box; all text is HTML laid over it, so that it never distorts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

from pipeline.record.formats import short

BUCKETS = 300
"""Most points of a curve. More lines than that are thinned: their mean is drawn over the band of their extremes."""

_DOTTED = 40
"""Most points of a curve that are marked one by one; the round cap of a line of no length makes the mark."""

_NOTHING = 1e-30
"""Smaller values are drawn as zero; an axis that shows them apart would leave the range of floats."""

_SIDE = 1000.0
"""Units of the SVG's box, both ways."""


@dataclass(frozen=True)
class Series:
    """One quantity over the buckets (K). None where the bucket holds no finite value."""

    mean: list[float | None]
    low: list[float | None]
    high: list[float | None]
    broken: list[bool]
    """Whether the bucket holds a value that is not finite."""


@dataclass(frozen=True)
class Curves:
    """A run's metrics, thinned. All series share the buckets."""

    x: list[float]
    """Samples seen (steps, when the metrics do not hold samples), of the last line of each bucket."""
    step: list[int]
    unit: str
    restarts: list[float]
    """Where a new attempt's first line lies."""
    series: dict[str, Series]

    def place(self, x: float) -> float:
        """``x`` as a part of the width, from the run's start at 0 to its last line at 1."""
        return x / self.x[-1]


def curves(rows: Sequence[dict[str, Any]]) -> Curves:
    """Thin the rows of :func:`pipeline.record.metrics.read_metrics`; there must be at least one."""
    unit = "samples" if all("samples" in row for row in rows) else "step"
    position = "samples" if unit == "samples" else "step"
    size = math.ceil(len(rows) / BUCKETS)
    buckets = [rows[i : i + size] for i in range(0, len(rows), size)]
    names = dict.fromkeys(k for row in rows for k, v in row.items() if isinstance(v, int | float))
    attempts = [row.get("attempt", 0) for row in rows]
    return Curves(
        x=[bucket[-1][position] for bucket in buckets],
        step=[bucket[-1]["step"] for bucket in buckets],
        unit="samples" if unit == "samples" else "steps",
        restarts=[rows[i][position] for i in range(1, len(rows)) if attempts[i] != attempts[i - 1]],
        series={name: _series(name, buckets) for name in names},
    )


def _series(name: str, buckets: list[Sequence[dict[str, Any]]]) -> Series:
    series = Series([], [], [], [])
    for bucket in buckets:
        values = [row[name] for row in bucket if name in row]
        finite = [v for v in values if math.isfinite(v)]
        series.mean.append(math.fsum(finite) / len(finite) if finite else None)
        series.low.append(min(finite, default=None))
        series.high.append(max(finite, default=None))
        series.broken.append(len(finite) < len(values))
    return series


@dataclass(frozen=True)
class Axis:
    """The vertical axis of a chart: a linear or a logarithmic scale."""

    low: float
    high: float
    log: bool

    @classmethod
    def fit(cls, series: Sequence[Series], from_zero: bool) -> Axis:
        """Hold all values. Logarithmic when single values tower over the rest, which would flatten everything else."""
        high = [v for s in series for v in s.high if v is not None] or [1.0]
        low = [v for s in series for v in s.low if v is not None] or [0.0]
        top, bottom, middle = max(high), min(low), sorted(high)[len(high) // 2]
        if bottom > _NOTHING and top > 20 * middle:
            return cls(bottom / 1.1, top * 1.1, True)
        if from_zero and bottom >= 0:
            return cls(0.0, top * 1.05 if top > _NOTHING else 1.0, False)
        pad = max((top - bottom) * 0.06, abs(top) * 0.01)
        pad = pad if pad > _NOTHING else 1.0
        return cls(bottom - pad, top + pad, False)

    def place(self, value: float) -> float:
        """``value`` as a part of the height, 0 at the bottom to 1."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """A few round values inside the axis."""
        if not self.log:
            return round_values(self.low, self.high)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits, every in (((1,), 2), ((1,), 1), ((1, 3), 1), ((1, 2, 5), 1)):
            ticks = [d * 10.0**e for e in decades if e % every == 0 for d in digits]
            ticks = [t for t in ticks if self.low <= t <= self.high]
            if len(ticks) >= 3:
                break
        return ticks[:: math.ceil(len(ticks) / 6)]


def round_values(low: float, high: float) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten between the two, three to seven of them."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    unit = next(power * f for f in (1, 2, 2.5, 5, 10) if power * f >= rough * (1 - 1e-9))
    first, last = math.ceil(low / unit - 1e-9), math.floor(high / unit + 1e-9)
    return [unit * k for k in range(first, last + 1)]


def chart(title: str, names: Sequence[str], data: Curves, *, percent: bool = False, from_zero: bool = False) -> str:
    """One chart as a ``<figure>``. Series are told apart by the order of ``names``; a label is what follows a "/"."""
    series = [data.series[name] for name in names]
    axis = Axis.fit(series, from_zero)
    text = (lambda v: f"{v * 100:.3g}%") if percent else short
    shapes, broken = [], set()
    for number, one in enumerate(series, start=1):
        shapes.append(_shapes(one, data, axis, number))
        broken |= {data.place(x) for x, bad in zip(data.x, one.broken, strict=True) if bad}
    over = [f'<span class="y" style="bottom:{axis.place(t) * 100:.2f}%">{text(t)}</span>' for t in axis.ticks()]
    for x in round_values(0, data.x[-1]):
        over.append(f'<span class="x" style="left:{data.place(x) * 100:.2f}%">{short(x)}</span>')
    over += [f'<i class="restart" style="left:{data.place(x) * 100:.2f}%"></i>' for x in data.restarts]
    over += [f'<i class="broken" style="left:{p * 100:.2f}%" title="not finite">&times;</i>' for p in sorted(broken)]
    grid = "".join(f'<path class="grid" d="{_path([(0, axis.place(t)), (1, axis.place(t))])}"/>' for t in axis.ticks())
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b>{" <small>log</small>" if axis.log else ""}'
        f'<span class="legend">{_legend(names, series, text)}</span></figcaption>'
        f'<div class="plot"{" data-percent" if percent else ""} data-low="{axis.low!r}" data-high="{axis.high!r}"'
        f"{' data-log' if axis.log else ''}>"
        f'<svg viewBox="0 0 {_SIDE:g} {_SIDE:g}" preserveAspectRatio="none" role="img" aria-label="{escape(title)}">'
        f"{grid}{''.join(shapes)}</svg>{''.join(over)}</div></figure>"
    )


def _legend(names: Sequence[str], series: Sequence[Series], text: Any) -> str:
    parts = []
    for number, (name, one) in enumerate(zip(names, series, strict=True), start=1):
        label = escape(name.partition("/")[2] or name) + " " if len(names) > 1 else ""
        last = next((v for v in reversed(one.mean) if v is not None), None)
        value = "not finite" if last is None else text(last)
        parts.append(f'<span class="s{number}">{label}<output data-series="{escape(name)}">{value}</output></span>')
    return "".join(parts)


class _Point(NamedTuple):
    x: float
    mean: float
    low: float
    high: float


def _shapes(series: Series, data: Curves, axis: Axis, number: int) -> str:
    """The band of the extremes and the line of the means, both interrupted where nothing is finite."""
    line, band, dots = "", "", ""
    for run in _runs(series, data):
        line += _path([(p.x, axis.place(p.mean)) for p in run])
        if len(run) == 1 or len(data.x) <= _DOTTED:
            dots += "".join(_path([(p.x, axis.place(p.mean))]) + "h0" for p in run)
        if any(p.low != p.high for p in run):
            upper = [(p.x, axis.place(p.high)) for p in run]
            lower = [(p.x, axis.place(p.low)) for p in reversed(run)]
            band += _path(upper + lower) + "Z"
    paths = {"band": band, "line": line, "dots": dots}
    return "".join(f'<path class="{kind} s{number}" d="{path}"/>' for kind, path in paths.items() if path)


def _path(points: Sequence[tuple[float, float]]) -> str:
    """A path through points given as parts of width and height."""
    return "M" + "L".join(f"{x * _SIDE:.1f} {(1 - y) * _SIDE:.1f}" for x, y in points)


def _runs(series: Series, data: Curves) -> list[list[_Point]]:
    """Points joined by a line: all that hold a value, parted where a bucket holds only values that are not finite."""
    runs: list[list[_Point]] = [[]]
    for x, mean, low, high, broken in zip(data.x, series.mean, series.low, series.high, series.broken, strict=True):
        if mean is not None and low is not None and high is not None:
            runs[-1].append(_Point(data.place(x), mean, low, high))
        elif broken:
            runs.append([])
    return [run for run in runs if run]
