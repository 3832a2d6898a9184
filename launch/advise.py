"""``sluice advise``: what a pretrained encoder is worth for a data set, and which way of fine-tuning to begin with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from launch.evaluate import Wish, arguments_of, start
from pipeline.config.data import EvalData
from pipeline.config.parts import HeldOut
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.files import replace_file

if TYPE_CHECKING:
    from pipeline.record.advice import Score

FILE = "advice.txt"
NEIGHBOURS = 20
SHOTS = (1, 5, 10, 20)
_PARTS: tuple[Literal["held_out", "rest"], ...] = ("held_out", "rest")
BATCH = 64
"""Of a trial: at most, and at most a quarter of the samples."""


@dataclass(frozen=True)
class Question:
    """What is asked on the command line."""

    data: str
    encoder: str
    out: Path
    share: float = 0.2
    """Of the data set, held out by a hash of the key: what is measured on; nothing else is looked at."""
    tries: str | None = None
    """Length of each trial fine-tuning; None: none is made."""
    procs: int = 1


@dataclass(frozen=True)
class Counted:
    """What there is to train on."""

    samples: int
    classes: int
    fewest: int
    """Samples of the class that has fewest, of those that have any."""


def advise(question: Question) -> str:
    """Measure, and say what follows.

    Raises:
        ConfigError: the data has no labels, or too few; a length that is none.
        DataError: there is no such data set; an evaluation has failed.
    """
    from pipeline.record.advice import COST, Known, advice

    known = counted(question)
    found: dict[str, dict[str, Score]] = {}
    for kind in ("pretrained", "untrained"):
        found[kind] = _measured(question, kind, known)
    ways = [(way, found["pretrained"].get(f"finetune:{way}")) for way in COST]
    tried = {way: score for way, score in ways if score is not None}
    if (scratch := found["untrained"].get("finetune:full")) is not None:
        tried["scratch"] = scratch
    scores = [{n: s for n, s in scores.items() if not n.startswith("finetune:")} for scores in found.values()]
    text = advice(Known(known.samples, known.classes, scores[0], scores[1], tried))
    replace_file(question.out / FILE, f"{text}\n".encode())
    return text


def counted(question: Question) -> Counted:
    """Count the part that is trained on.

    Raises:
        ConfigError: it has no two classes with two samples each, or fewer than 20 samples.
    """
    import numpy as np

    from pipeline.config.schema import Data
    from pipeline.data.dataset import open_data
    from pipeline.data.selected import labels
    from pipeline.data.selection import Selection

    part = open_data(Data(train=question.data, held_out=HeldOut(part="rest", share=question.share)))
    assert isinstance(part, Selection)
    counts = np.bincount(labels(part))
    counts = counts[counts > 0]
    if len(counts) < 2 or part.samples < 20:
        raise ConfigError(
            f"{question.data}: advice needs two classes and 20 samples to train on, there are {len(counts)} and "
            f"{part.samples}, beside the {question.share:.0%} that are held out"
        )
    return Counted(part.samples, len(counts), int(counts.min()))


def suite(question: Question, known: Counted, kind: str) -> str:
    """The text of the suite for the encoder ("pretrained"), or for random weights of its shape ("untrained")."""
    held_out, rest = (HeldOut(part=part, share=question.share) for part in _PARTS)
    streams = {
        "train": EvalData(path=question.data, held_out=rest),
        "val": EvalData(path=question.data, held_out=held_out),
    }
    shots = [n for n in SHOTS if n <= known.fewest]
    evals: list[dict[str, object]] = [
        {"name": "knn", "k": [min(NEIGHBOURS, known.samples)]},
        {"name": "transferability"},
    ]
    if shots:
        evals.append({"name": "few_shot", "shots": shots})
    if question.tries is not None:
        modes = ("frozen", "partial", "lp_ft", "full") if kind == "pretrained" else ("full",)
        batch = max(1, min(BATCH, known.samples // 4) // question.procs) * question.procs
        for mode in modes:
            evals.append({"name": "finetune", "mode": mode, "training": _training(question.tries, batch, kind, mode)})
    import tomli_w

    dumped = {name: stream.model_dump(mode="json", exclude_none=True) for name, stream in streams.items()}
    return tomli_w.dumps({"streams": dumped, "evals": evals})


def _training(length: str, batch: int, kind: str, mode: str) -> dict[str, object]:
    """Of a trial. A drawn classifier learns faster than what was pretrained, one from a probe does not."""
    optimizer: dict[str, object] = {"lr": 1e-3, "betas": [0.9, 0.999]}
    if kind == "pretrained":
        optimizer["layer_decay"] = 0.75
        if mode != "lp_ft":
            optimizer["groups"] = [{"prefix": "head", "lr": 10.0}]
    schedule = {"name": "cosine", "warmup": "10%"}
    return {"length": length, "global_batch": batch, "optimizer": optimizer, "schedule": schedule}


def _measured(question: Question, kind: str, known: Counted) -> dict[str, Score]:
    """Run a suite, and read what it gave: by metric; of trials by "finetune:MODE"."""
    from pipeline.record.advice import Score
    from pipeline.record.results import read_results

    folder = question.out / kind
    file, text = folder / "suite.toml", f"# {question.encoder}\n{suite(question, known, kind)}"
    if file.exists() and file.read_text() != text:
        raise ConfigError(f"--out {question.out}: it holds the answer to another question; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(file, text.encode())
    wish = Wish((question.encoder, str(file)), random_init=kind == "untrained", out=folder)
    code = start(arguments_of(wish), question.procs)
    results = read_results(folder)
    if code or results.failed:
        said = "; ".join(f"{one.task}: {one.text}" for one in results.failed) or "see above"
        raise DataError(f"what was to be measured of {question.encoder} ({kind}) has failed: {said}")
    found: dict[str, Score] = {}
    for row in results.rows:
        score = Score(row.value, row.stderr or 0.0)
        if row.evaluation == "finetune":
            if row.metric == "finetune/top1":
                found[f"finetune:{row.settings['mode']}"] = score
        elif not any(part in row.metric for part in ("top5", "recall", "best_depth")):
            found[row.metric] = score
    return found
