"""How large and how quick the models of a table are: parameters, and milliseconds for one image on one CPU thread.

Not collected by pytest: run it as ``python -m tests.perf.students NAME FOLDERS`` after ``python -m tests.tables`` has
taken over accuracies from the same folders; the two columns of the record are filled in for each of its rows.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from pipeline.config.load import load_run
from pipeline.core.manifest import load
from pipeline.nn.construct import construct_encoder
from pipeline.nn.encoder import EncoderConfig, ImageClassifier
from tests.tables import FOLDER, SEED, read_table, shown, write_table

ROUNDS = 200


def classifier(run: Path) -> tuple[str, ImageClassifier]:
    """The classifier that a run trains, with random weights, and what tells it from others."""
    config = load_run(run / "config.toml")
    given = {
        key: config.objective.settings[key] for key in EncoderConfig.model_fields if key in config.objective.settings
    }
    settings = EncoderConfig(**given | {"weights": None})
    encoder = construct_encoder(settings, config.data.image.shape, config.objective.name, start=None).eval()
    assert isinstance(config.data.train, str)
    head = nn.Linear(encoder.dim, len(load(config.data.train).classes))
    return json.dumps([settings.encoder, settings.encoder_args], sort_keys=True), ImageClassifier(
        encoder, nn.Identity(), head
    )


@torch.no_grad()
def milliseconds(model: nn.Module, side: int) -> float:
    """CPU time of one image, the median."""
    image, found = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8), list[float]()
    for _ in range(ROUNDS):
        begun = time.process_time()
        model(image)
        found.append(time.process_time() - begun)
    return 1000 * statistics.median(found)


def sizes(wanted: Collection[str], folders: Sequence[Path]) -> dict[str, dict[str, float]]:
    """Of runs by their names, without seeds."""
    found: dict[str, dict[str, float]] = {}
    known: dict[str, dict[str, float]] = {}
    for run in (path for folder in folders for path in sorted(folder.iterdir()) if (path / "config.toml").exists()):
        name = SEED.match(run.name)
        assert name is not None
        if name["run"] in found or name["run"] not in wanted:
            continue
        kind, model = classifier(run)
        if kind not in known:
            count = float(sum(p.numel() for p in model.parameters()))
            known[kind] = {"parameters": count, "latency": milliseconds(model, 32)}
        found[name["run"]] = known[kind]
    return found


def main() -> None:
    """Fill in both columns."""
    torch.set_num_threads(1)
    path = FOLDER / f"{sys.argv[1]}.toml"
    table = read_table(path)
    found = sizes({row.run or row.title for row in table.rows}, [Path(word) for word in sys.argv[2:]])
    rows = [replace(row, values=row.values | found[row.run or row.title]) for row in table.rows]
    write_table(path, replace(table, rows=rows))
    print(shown(read_table(path)))


if __name__ == "__main__":
    main()
