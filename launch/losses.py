"""``sluice losses``: the samples of a run that it found worst, forgot, or learnt late."""

from __future__ import annotations

from pathlib import Path

from pipeline.core.errors import ConfigError
from pipeline.core.files import replace_file
from pipeline.record.losses import History, Listed, Order

ORDERS: tuple[Order, ...] = ("worst", "forgotten", "late")


def show(run: Path, by: Order, count: int, out: Path | None, others: bool, source: str | None) -> str:
    """A table of the first samples; with ``out``, a file of their numbers for ``data.keep``.

    Args:
        run: its folder.
        by: which come first.
        count: how many.
        out: the file; None: none.
        others: it holds all samples but these.
        source: of several data sets the one whose numbers are written.

    Raises:
        ConfigError: no losses were kept; a data set must be named, or is not one of the run's.
        DataError: they are damaged.
    """
    history = History(run)
    order = history.order(by)
    first = history.listed(order[:count])
    if out is not None:
        paths = [str(known["path"]) for known in history.sets]
        if source is None and len(paths) > 1:
            known = ", ".join(paths)
            raise ConfigError(f"{run} was trained on several data sets; name one of them: --source PATH ({known})")
        if source is not None and source not in paths:
            raise ConfigError(f"{run} was not trained on {source}, but on {', '.join(paths)}")
        wanted = first
        if others:
            shown = {sample.id for sample in first}
            wanted = history.listed([i for i in range(history.losses.shape[1]) if i not in shown])
        numbers = sorted(sample.number for sample in wanted if source in (None, sample.where))
        replace_file(out, "".join(f"{number}\n" for number in numbers).encode())
    return _table(history, first, len(order))


def _table(history: History, listed: list[Listed], total: int) -> str:
    epochs = history.epochs[-6:]
    several = len(history.sets) > 1
    head = ["sample", *(["data set"] if several else []), *(f"epoch {epoch}" for epoch in epochs)]
    rows = [
        [
            str(sample.number),
            *([sample.where] if several else []),
            *("" if loss != loss else f"{loss:.4g}" for loss in sample.losses[-6:]),
        ]
        for sample in listed
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    return "\n".join([*lines, f"{len(listed):,} of {total:,}"])
