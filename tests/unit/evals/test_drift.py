"""Accuracies by domain and group against counting by hand."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.linear_model import Ridge

from pipeline.core.errors import ConfigError, DataError
from pipeline.core.evaluation import Table
from pipeline.evals.drift import Config, Drift
from tests.contracts.components import ListStream, context, numbers
from tests.unit.evals.test_knn import Identity


class Grouped(ListStream):
    """With a number for each sample."""

    def __init__(self, x, label, group):
        super().__init__(x, label)
        self.group = group

    def __iter__(self):
        return (batch | {"site": self.group[batch["id"]]} for batch in super().__iter__())


def streams(column: bool = True) -> dict[str, Grouped]:
    """Three clouds; in "far" they are moved, in "farther" by more. Features of "train" alone are learnt from."""
    generator = torch.Generator().manual_seed(0)
    centre = 1.2 * torch.randn(3, 4, generator=generator)
    found = {}
    for name, n, shift in (("train", 80, 0.0), ("val", 61, 0.0), ("far", 47, 0.8), ("farther", 39, 1.6)):
        label = torch.randint(0, 3, (n,), generator=generator)
        x = centre[label] + torch.randn(n, 4, generator=generator) + shift * torch.tensor([1.0, -1.0, 0.0, 0.5])
        group = torch.arange(n) % 3 * 2
        found[name] = Grouped(x, label, group.double()[:, None] if column else group)
        found[name].fingerprint = name
    return found


def right_by_hand(data) -> dict[str, np.ndarray]:
    x, label = data["train"].image.double().numpy(), data["train"].label.numpy()
    mean, std = x.mean(0), x.std(0)
    model = Ridge(alpha=1e-2 * len(x)).fit((x - mean) / std, np.eye(3)[label])
    return {
        name: model.predict((own.image.double().numpy() - mean) / std).argmax(1) == own.label.numpy()
        for name, own in data.items()
    }


@pytest.mark.parametrize("column", [True, False])
def test_equals_counting_by_hand(lone_group, column):
    data = streams(column)
    right = right_by_hand(data)
    evaluation = Drift(Config(domains=("far", "farther"), group="site", least=10, l2=(1e-2,)))
    assert evaluation.uses().streams == {
        "train": ("image", "label"), **dict.fromkeys(("val", "far", "farther"), ("image", "label", "site"))
    }  # fmt: skip
    ctx = context({"image": Identity()}, data)
    found = numbers(evaluation, ctx)
    top1 = {name: own.mean() for name, own in right.items()}
    assert 0.9 > top1["val"] > max(top1["far"], top1["farther"]) > 0.1
    for name in ("val", "far", "farther"):
        number = found[f"drift/top1_{name}"]
        assert number.value == pytest.approx(top1[name]) and number.split == name and number.samples is not None
        assert np.array_equal(number.samples, right[name])
        assert number.stderr == pytest.approx(right[name].std() / len(right[name]) ** 0.5)
    assert found["drift/gap"].value == pytest.approx(top1["val"] - (top1["far"] + top1["farther"]) / 2)
    se = {name: own.std() / len(own) ** 0.5 for name, own in right.items()}
    assert found["drift/gap"].stderr == pytest.approx(
        (se["val"] ** 2 + (se["far"] ** 2 + se["farther"] ** 2) / 4) ** 0.5
    )
    groups = [(name, g, right[name][np.arange(len(right[name])) % 3 * 2 == g])
              for name in ("val", "far", "farther") for g in (0, 2, 4)]  # fmt: skip
    worst = min(groups, key=lambda group: group[2].mean())
    assert (found["drift/worst"].value, found["drift/worst"].n) == (pytest.approx(worst[2].mean()), len(worst[2]))
    with torch.no_grad():
        (table,) = [o for o in evaluation.run(ctx) if isinstance(o, Table)]
    assert [row[:4] for row in table.rows] == [(d, g, len(r), pytest.approx(r.mean())) for d, g, r in groups]


def test_small_groups_do_not_make_the_worst(lone_group):
    data = streams()
    data["val"].group[:] = 0
    wrong = int(np.flatnonzero(~right_by_hand(data)["val"])[0])
    data["val"].group[wrong] = 7
    ctx = context({"image": Identity()}, data)
    few = numbers(Drift(Config(group="site", least=1, l2=(1e-2,))), ctx)
    enough = numbers(Drift(Config(group="site", least=2, l2=(1e-2,))), ctx)
    assert few["drift/worst"].value == 0.0 and few["drift/worst"].n == 1
    assert enough["drift/worst"].value > 0.5 and enough["drift/worst"].n == 60
    assert "drift/gap" not in few


def test_what_makes_no_sense_is_refused(lone_group):
    with pytest.raises(ValidationError, match="nothing to compare"):
        Config()
    with pytest.raises(ValidationError, match="named twice"):
        Config(domains=("val",))
    data = streams()
    ctx = context({"image": Identity()}, data)
    data["far"].group += 0.5
    with pytest.raises(DataError, match="'site' of stream 'far' is no whole number"):
        numbers(Drift(Config(domains=("far",), group="site")), ctx)
    data["far"].fingerprint = "val"
    with pytest.raises(ConfigError, match="stream 'far' is the same data as 'val'"):
        numbers(Drift(Config(domains=("far",))), ctx)
