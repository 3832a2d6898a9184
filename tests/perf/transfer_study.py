"""Ways of fine-tuning against the number of labels: results of two suites as a record for a table, and a plot of it.

Not collected by pytest: run it as ``python -m tests.perf.transfer_study RESULTS`` after the commands that stand in
``configs/finetune/README.md``; the record is ``tests/perf/records/tables/transfer.toml``, the plot lies beside it.
"""

from __future__ import annotations

import re
import sys
from datetime import date
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from pipeline.record.results import read_results
from tests.records import ROOT, commit_now
from tests.tables import FOLDER, Column, Row, Table, shown, write_table

WAYS = {"frozen": "frozen", "partial": "last 2 blocks", "lp_ft": "LP-FT", "full": "full", "scratch": "from scratch"}
SEEDS = 3
COMMAND = "sluice eval runs/demo/mae_transfer configs/eval/transfer_glyphs.toml"
HARDWARE = "two cores of an Intel Xeon, shared with others"


def collected(results: Path) -> dict[str, dict[int, list[float]]]:
    """Accuracy by way of fine-tuning, labels per class and draw."""
    found: dict[str, dict[int, list[float]]] = {way: {} for way in WAYS}
    for row in read_results(results).rows:
        name = re.fullmatch(r"labels(\d+)_(\d+)", row.data_name)
        if row.metric != "finetune/top1" or name is None:
            continue
        way = "scratch" if row.subject.startswith("random:") else row.settings["mode"]
        draws = found[way].setdefault(int(name[1]), [float("nan")] * SEEDS)
        draws[int(name[2])] = row.value
    return found


def table(found: dict[str, dict[int, list[float]]]) -> Table:
    """Ways by labels, each against training from scratch."""
    counts = sorted({count for by_count in found.values() for count in by_count})
    columns = [Column(f"labels{n}", f"{n} per class, %", 100.0, 1, compared=True) for n in counts]
    rows = [Row(title, {f"labels{n}": found[way][n] for n in counts if n in found[way]}) for way, title in WAYS.items()]
    origin = {
        "command": COMMAND,
        "commit": commit_now(),
        "date": date.today(),
        "hardware": HARDWARE,
        "seeds": SEEDS,
    }
    return Table(origin, columns, rows, WAYS["scratch"], "top-1 on unseen typefaces")


def plot(found: dict[str, dict[int, list[float]]], path: Path) -> None:
    """A line for each way, with every draw as a dot."""
    figure, axes = plt.subplots(figsize=(6, 4))
    for way, title in WAYS.items():
        counts = sorted(found[way])
        means = [100 * sum(found[way][n]) / len(found[way][n]) for n in counts]
        (line,) = axes.plot(counts, means, label=title, linestyle="--" if way == "scratch" else "-")
        for n in counts:
            axes.scatter([n] * SEEDS, [100 * value for value in found[way][n]], s=9, color=line.get_color())
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.set_xlabel("labels per class")
    axes.set_ylabel("top-1 on unseen typefaces, %")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Write record and plot."""
    found = collected(Path(sys.argv[1]))
    made = table(found)
    write_table(FOLDER / "transfer.toml", made)
    plot(found, ROOT / "configs" / "finetune" / "transfer.png")
    print(shown(made))


if __name__ == "__main__":
    main()
