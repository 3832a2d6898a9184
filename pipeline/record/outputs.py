"""From what an evaluation yields to what is kept of it: entries of ``results.json``, and the pictures beside it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.core.evaluation import Figure, Number, Output, Table
from pipeline.core.files import replace_file
from pipeline.record.pictures import png
from pipeline.record.results import FIGURES, KeptFigure, KeptTable, Origin, Results, Row, add_results


def found(outputs: Iterable[Output], origin: Origin) -> Results:
    """What an evaluation yielded, each with its origin and the present time."""
    settings = dict(origin.settings)
    known: dict[str, Any] = {
        "model": origin.model,
        "step": origin.step,
        "weights": origin.weights,
        "evaluation": origin.evaluation,
        "settings": settings,
        "config": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16],
        "manifests": dict(origin.data),
        "seed": origin.seed,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    results = Results([], [], [])
    for o in outputs:
        own: dict[str, Any] = known | {"metric": o.name, "split": o.split}
        if isinstance(o, Number):
            results.rows.append(Row(**own, value=o.value, n=o.n, stderr=o.stderr, better=o.better))
        elif isinstance(o, Table):
            results.tables.append(KeptTable(**own, columns=list(o.columns), rows=[list(row) for row in o.rows]))
        else:
            results.figures.append(KeptFigure(**own, caption=o.caption))
    return results


def keep(folder: str | os.PathLike[str], outputs: Iterable[Output], new: Results) -> None:
    """Add to a folder's results. A picture is whole before ``results.json`` names it.

    Args:
        folder: of the results.
        outputs: what the evaluation yielded.
        new: the same with its origin, from :func:`found`.

    Raises:
        OSError: the disk takes no more.
    """
    pictures = [output for output in outputs if isinstance(output, Figure)]
    if pictures:
        (Path(folder) / FIGURES).mkdir(exist_ok=True)
    for picture, figure in zip(pictures, new.figures, strict=True):
        replace_file(Path(folder) / figure.file, png(picture.image))
    add_results(folder, new)
