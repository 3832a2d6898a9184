"""Which way of fine-tuning fits a data set: a table by size and similarity, and what was measured. No torch here.

The table is what the field teaches (Yosinski et al. 2014; Kornblith et al. 2019; Kumar et al. 2022 for LP-FT); whatever
was measured decides above it. Of ways that are as good as the best, to one standard error, the cheapest is recommended.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Size = Literal["small", "medium", "large"]
MEDIUM, LARGE = 1_000, 20_000
"""Labelled samples from which on a data set is medium, and large."""
SIMILAR = 0.5
"""Part of the errors of untrained features that pretrained ones spare, from which on data counts as similar."""
COST = ("frozen", "partial", "lp_ft", "full", "scratch")
"""Ways of fine-tuning, the cheapest first."""
WORDS = {
    "frozen": "frozen features: a classifier on them",
    "partial": "the last blocks and the classifier",
    "lp_ft": "the classifier first, then all (LP-FT)",
    "full": "all from the start",
    "scratch": "from random weights",
}
TABLE: dict[tuple[Size, bool], tuple[str, str]] = {
    ("small", True): ("frozen", "frozen features: kNN, ridge or logistic regression"),
    ("small", False): ("partial", "probes of earlier blocks, then the last blocks at a low rate"),
    ("medium", True): ("lp_ft", "the classifier first, then all from there (LP-FT)"),
    ("medium", False): ("partial", "the last blocks; or all with rates by layer, layer_decay 0.65 to 0.75"),
    ("large", True): ("full", "all, the classifier at ten times the rate"),
    ("large", False): ("full", "all, beside a run from random weights as a control"),
}


class Score(NamedTuple):
    """A number on held-out samples."""

    value: float
    error: float = 0.0
    """Standard error."""


@dataclass(frozen=True)
class Known:
    """What was found out."""

    samples: int
    """Labelled ones to train on."""
    classes: int
    pretrained: Mapping[str, Score]
    """Metric to its value for the encoder: "knn/top1_k20", "transferability/logme", ..."""
    untrained: Mapping[str, Score]
    """The same of random weights of its shape."""
    strategies: Mapping[str, Score] = field(default_factory=dict[str, Score])
    """Accuracy of each way of :data:`COST` that was tried."""


def size_of(samples: int) -> Size:
    """Of a data set."""
    return "small" if samples < MEDIUM else "medium" if samples < LARGE else "large"


def last_probe(scores: Mapping[str, Score]) -> Score:
    """Accuracy of the probe of the last block."""
    probes = [score for name, score in scores.items() if name.startswith("transferability/top1_")]
    return probes[-1] if probes else next(score for name, score in scores.items() if name.startswith("knn/top1_k"))


def spared(known: Known) -> float:
    """Part of the errors of a probe of random features that pretrained ones spare; negative where they are worse."""
    ours, theirs = last_probe(known.pretrained).value, last_probe(known.untrained).value
    return (ours - theirs) / (1 - theirs) if theirs < 1 else 0.0


def recommended(known: Known) -> tuple[str, str]:
    """A way of fine-tuning, and why."""
    tried = {name: known.strategies[name] for name in COST if name in known.strategies}
    if tried:
        best = max(tried, key=lambda name: tried[name].value)
        least = tried[best].value - tried[best].error
        name = next(name for name in tried if tried[name].value >= least)
        why = f"{_percent(tried[name])} on held-out samples"
        if name != best:
            why += f", within a standard error of the best, {best} with {_percent(tried[best])}"
        return name, why
    size, similar = size_of(known.samples), spared(known) >= SIMILAR
    name, words = TABLE[size, similar]
    return name, f"by the table, for {size} data that is {'similar' if similar else 'different'}: {words}"


def negative(known: Known) -> list[str]:
    """Where pretraining is worse than none, by more than two standard errors of the difference."""
    found: list[str] = []
    tried = {name: score for name, score in known.strategies.items() if name != "scratch"}
    if (scratch := known.strategies.get("scratch")) is not None and tried:
        best = max(tried, key=lambda name: tried[name].value)
        random = f"random weights reach {_percent(scratch)}"
        if _worse(tried[best], scratch):
            found.append(f"the best from this encoder, {best}, reaches {_percent(tried[best])}; {random}")
        elif "full" in tried and _worse(tried["full"], scratch):
            found.append(f"full fine-tuning reaches {_percent(tried['full'])}; {random}")
    ours, theirs = last_probe(known.pretrained), last_probe(known.untrained)
    if _worse(ours, theirs):
        found.append(f"a probe of its last block reaches {_percent(ours)}; of random weights {_percent(theirs)}")
    return found


def _worse(one: Score, other: Score) -> bool:
    return other.value - one.value > 2 * math.hypot(one.error, other.error)


def _percent(score: Score) -> str:
    return f"{100 * score.value:.1f} % +- {100 * score.error:.1f}"


def advice(known: Known) -> str:
    """All of it, for a person."""
    size, share = size_of(known.samples), spared(known)
    each = f"{known.samples / known.classes:.1f} each"
    lines = [f"size        {known.samples:,} labelled samples of {known.classes} classes, {each}: {size}", ""]
    lines.append(f"{'measured on held-out samples':<34}{'this encoder':>18}{'random weights':>18}")
    for name, score in known.pretrained.items():
        other = known.untrained.get(name)
        lines.append(f"{name:<34}{_shown(name, score):>18}{_shown(name, other) if other else '':>18}")
    word = "similar to" if share >= SIMILAR else "different from"
    how_far = f"pretraining spares {100 * share:.0f} % of a probe's errors: {word} what it was trained on"
    lines += ["", f"distance    {how_far}", "", f"{'':10}{'similar':<54}different"]
    for row in ("small", "medium", "large"):
        marks = [("> " if (row, similar) == (size, share >= SIMILAR) else "  ") for similar in (True, False)]
        cells = [mark + TABLE[row, similar][1] for mark, similar in zip(marks, (True, False), strict=True)]
        lines.append(f"  {row:<8}{cells[0]:<54}{cells[1]}")
    if known.strategies:
        lines += ["", "tried"]
        lines += [f"  {n:<9}{_percent(known.strategies[n]):<16}{WORDS[n]}" for n in COST if n in known.strategies]
    name, why = recommended(known)
    lines += ["", f"recommended {name}: {why}"]
    lines += [f"negative transfer: {text}" for text in negative(known)]
    return "\n".join(lines)


def _shown(name: str, score: Score) -> str:
    if "top1" in name or "shot" in name:
        return _percent(score)
    return f"{score.value:.4g}"
