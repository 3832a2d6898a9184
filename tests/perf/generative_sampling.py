"""How long the models of configs/generative/table.toml take for an image.

Command: python -m tests.perf.generative_sampling runs/generative/table [--samples 64] [--repeats 3] [--processor-time]
Each run's newest checkpoint with averaged weights, as its showcase samples, all in one batch; the models in
turn, so that each meets the same load. The medians go into tests/perf/records/tables/generative.toml.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from pipeline.core.errors import NonFiniteError
from pipeline.core.evaluation import Maker
from pipeline.dist.group import Place, process_group
from pipeline.suites import subjects
from pipeline.suites.subject import open_subject
from tests.tables import FOLDER, read_table, write_table

RECORD = FOLDER / "generative.toml"
COLUMN = "seconds"


def maker(run: Path, place: Place) -> Maker:
    """What makes images, with averaged weights."""
    (spec,) = subjects.find([str(run)], ("ema",))
    return cast("Maker", open_subject(spec, place).encoders["generator"])


def once(model: Maker, samples: int, *, processor: bool) -> float:
    """Seconds for an image."""
    clock = time.process_time if processor else time.perf_counter
    ids = torch.arange(samples)
    prompt = {"label": ids % model.classes} if model.told == "label" else {}
    begin = clock()
    # A sample that is not finite took its time all the same.
    with torch.inference_mode(), suppress(NonFiniteError):
        model.make(ids, prompt, 0, model.settings({}))
    return (clock() - begin) / samples


def main() -> None:
    """Time all rows of the record that have a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processor-time", action="store_true", help="where other work shares the machine")
    asked = parser.parse_args()
    table = read_table(RECORD)
    taken: dict[str, list[float]] = {}
    with process_group(10) as place:
        makers = {row.title: maker(next(asked.runs.glob(f"{row.run},seed=*")), place) for row in table.rows}
        for title, model in [*makers.items()] * asked.repeats:
            taken.setdefault(title, []).append(once(model, asked.samples, processor=asked.processor_time))
    for title, seconds in taken.items():
        print(f"{title}: {statistics.median(seconds):.4f} s an image (from {min(seconds):.4f} to {max(seconds):.4f})")
    rows = [replace(row, values={**row.values, COLUMN: statistics.median(taken[row.title])}) for row in table.rows]
    write_table(RECORD, replace(table, rows=rows))


if __name__ == "__main__":
    main()
