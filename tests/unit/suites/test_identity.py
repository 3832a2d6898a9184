"""The hash of weights: a function of all values and names, of nothing else."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import nn

from pipeline.record.results import Origin
from pipeline.suites.identity import folder_names, weights_hash


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


def test_every_evaluation_has_a_folder_of_its_own_and_the_same_one_again():
    first = Origin("step 3", 3, "w", "knn", {"k": [5]}, {"test": "m"})
    others = [
        dataclasses.replace(first, **change)
        for change in (
            {"weights": "v"}, {"evaluation": "probe"}, {"settings": {"k": [6]}}, {"data": {"test": "n"}}, {"seed": 1}
        )
    ]  # fmt: skip
    names = folder_names([first, *others, dataclasses.replace(first, model="best")])
    assert len(set(names)) == 7 and all(re.fullmatch(r"(knn|probe)-[0-9a-f]{16}(-2)?", name) for name in names)
    assert folder_names([others[0], dataclasses.replace(first, model="best")]) == [names[1], names[0]]
