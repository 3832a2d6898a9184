"""The hash of weights: a function of all values and names, of nothing else."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.nn.weights import weights_hash
from pipeline.record.results import Origin
from pipeline.suites import identity
from pipeline.suites.identity import code_hash, streams_named


def modules() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"image": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), "text": nn.Linear(2, 2).to(torch.bfloat16)}


CHANGES = {
    "one value": lambda m: m["image"][0].weight.data[3, 2].add_(1e-6),
    "a buffer": lambda m: m["image"][1].running_mean.add_(1.0),
    "another encoder": lambda m: m["text"].bias.data.mul_(2),
    "the type": lambda m: m["image"].double(),
    "a name": lambda m: m.update(words=m.pop("text")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_it(change):
    assert weights_hash(modules()) == weights_hash(dict(reversed(modules().items())))
    changed = modules()
    CHANGES[change](changed)
    assert weights_hash(changed) != weights_hash(modules())


def test_every_evaluation_has_a_name_of_its_own_and_the_same_one_again():
    first = Origin("step 3", 3, "w", "knn", {"k": [5]}, {"test": "m"})
    others = [
        dataclasses.replace(first, **change)
        for change in (
            {"weights": "v"}, {"evaluation": "probe"}, {"settings": {"k": [6]}}, {"data": {"test": "n"}}, {"seed": 1},
            {"version": 2},
        )
    ]  # fmt: skip
    names = [origin.name for origin in (first, *others)]
    assert len(set(names)) == 7 and all(re.fullmatch(r"(knn|probe)-[0-9a-f]{16}", name) for name in names)
    assert dataclasses.replace(first, model="best", step=None).name == names[0]


def test_streams_are_known_by_what_they_are_used_for():
    settings = {"train": "a", "test": "b", "unknown": ["c", "d"], "k": [1, 2], "ways": ["knn"], "none": []}
    assert streams_named(settings, ["a", "b", "c", "d", "e"]) == {
        "train": "a", "test": "b", "unknown.0": "c", "unknown.1": "d", "e": "e"
    }  # fmt: skip


def test_other_code_of_what_an_evaluation_imports_is_other_code(tmp_path, monkeypatch):
    """Two evaluations share a file: changing it changes both; changing one's own leaves the other as it was."""
    evals, nn = tmp_path / "pipeline" / "evals", tmp_path / "pipeline" / "nn"
    for room in (evals, nn):
        room.mkdir(parents=True)
    (evals / "first.py").write_text("import math\nfrom pipeline.evals import _shared\n")
    (evals / "second.py").write_text("from pipeline.evals._shared import f\n")
    (evals / "_shared.py").write_text("def f():\n    from pipeline.nn.deep import g\n    return g\n")
    (nn / "deep.py").write_text("g = 1\n")

    def file(module: str) -> Path | None:
        path = tmp_path / f"{module.replace('.', '/')}.py"
        return path if path.is_file() else None

    monkeypatch.setattr(identity, "_file", file)
    before = [code_hash("first"), code_hash("second")]
    (evals / "first.py").write_text("from pipeline.evals import _shared\n")
    own = [code_hash("first"), code_hash("second")]
    assert own[0] != before[0] and own[1] == before[1]
    (nn / "deep.py").write_text("g = 2\n")
    deep = [code_hash("first"), code_hash("second")]
    assert deep[0] != own[0] and deep[1] != own[1]
