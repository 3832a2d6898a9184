"""One page of results: of several runs side by side, or of a folder of results that is no run."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from pipeline.record.exhibits import exhibits
from pipeline.record.lines import lines, models
from pipeline.record.page import facts, folded, page, tiles
from pipeline.record.results import Results, located, read_results, read_together, run_names
from pipeline.record.scoreboard import scoreboard


def board(folders: Sequence[str]) -> str:
    """HTML of the page.

    Raises:
        ConfigError: a run was not evaluated.
    """
    results = located(read_results(folders[0]), folders[0]) if len(folders) == 1 else read_together(folders)
    names = run_names(folders)
    title = ", ".join(names.values())
    head = (
        f'<header><p class="brand">Sluice results</p><div class="title"><h1>{escape(_shortened(title))}</h1></div>'
        "</header>"
    )
    where = folded("Where the results lie", facts([(name, str(Path(of).resolve())) for of, name in names.items()]))
    body = [head, _tiles(results), scoreboard(results), exhibits(results), f"<h2>Origin</h2>{where}"]
    return page(_shortened(title), "".join(body), wide=True)


def _shortened(title: str, most: int = 80) -> str:
    return title if len(title) <= most else f"{title[: most - 3].rstrip(', ')}..."


def _tiles(results: Results) -> str:
    counts = {
        "Models": len(models(results.rows)),
        "Metrics": len(lines(results.rows)),
        "Data sets": len({tuple(sorted(row.manifests.items())) for row in results.rows}),
        "Numbers": len(results.rows),
    }
    return tiles({name: f"{count:,}" for name, count in counts.items()})
