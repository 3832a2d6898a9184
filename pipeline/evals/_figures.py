"""Drawings: lines and clouds of points, without a window and the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INCHES, DOTS = (7.5, 4.5), 100
COLOURS = {10: "tab10", 20: "tab20"}
"""Of matplotlib's colour maps, by how many kinds they tell apart; the larger one has pale colours too."""


class Line(NamedTuple):
    """A curve with its name."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    bold: bool = False


def lines(curves: Sequence[Line], across: str, up: str) -> np.ndarray:
    """Curves over one axis, their names beside them, uint8[H,W,3]."""
    figure, axes = _sheet()
    for number, curve in enumerate(curves):
        shade, width = ("black", 2.5) if curve.bold else (colour(number, len(curves)), 1.5)
        axes.plot(curve.x, curve.y, label=curve.name, marker="o", markersize=3, color=shade, linewidth=width)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", bbox_to_anchor=(1.01, 1), loc="upper left", borderaxespad=0)
    return _pixels(figure)


def cloud(place: np.ndarray, kind: np.ndarray, names: Sequence[str], named: int = 20) -> np.ndarray:
    """Points in the plane, a colour for each kind.

    Args:
        place: float[N,2].
        kind: int64[N], a number into ``names``.
        names: of the kinds.
        named: of more kinds than these the legend is left out.

    Returns:
        uint8[H,W,3].
    """
    figure, axes = _sheet()
    shown = np.unique(kind).tolist()
    for number in shown:
        x, y = place[kind == number].T
        axes.scatter(x, y, s=8, linewidths=0, alpha=0.8, color=colour(number, len(names)), label=names[number])
    axes.set_xticks([])
    axes.set_yticks([])
    if len(shown) <= named:
        axes.legend(fontsize="x-small", bbox_to_anchor=(1.01, 1), loc="upper left", borderaxespad=0, markerscale=2)
    return _pixels(figure)


def colour(number: int, kinds: int) -> tuple[float, float, float]:
    """Red, green and blue of a kind, 0 to 1: from a list where there are few, around the circle of hues else."""
    import matplotlib
    from matplotlib.colors import hsv_to_rgb

    for most, name in COLOURS.items():
        if kinds <= most:
            red, green, blue, _ = matplotlib.colormaps[name](number)
            return red, green, blue
    turn = (number * 0.618034) % 1  # neighbours differ: the golden section
    red, green, blue = hsv_to_rgb((turn, 0.55 + 0.45 * (number % 2), 0.65 + 0.35 * (number % 3 == 0))).tolist()
    return red, green, blue


def _sheet() -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, dpi=DOTS, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _pixels(figure: Figure) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
