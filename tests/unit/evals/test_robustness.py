"""Accuracy on damaged images, against damaging and counting one image at a time."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from pipeline.core.errors import ConfigError
from pipeline.core.evaluation import Figure, Table
from pipeline.core.random import SampleRandom
from pipeline.dist.group import process_group
from pipeline.evals import robustness
from pipeline.evals.robustness import ALEXNET, Config, Robustness
from pipeline.nn.common_corruptions import STANDARD, corrupted
from tests.contracts.components import ListStream, context, numbers
from tests.ranks import start_ranks

NAMES, SEVERITIES = ("gaussian_noise", "brightness", "fog"), (1, 4)


class Bands(nn.Module):
    """Logits of three classes: the mean of each third of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, image):
        return (image.float() / 255).mean(dim=(1, 3)).unflatten(1, (3, -1)).mean(dim=2) + self.shift


def stream(rank: int = 0, world: int = 1, n: int = 31) -> ListStream:
    """A third of the rows is a little brighter."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 3, (n,), generator=generator)
    image = torch.randint(60, 140, (n, 3, 12, 12), generator=generator)
    for i, own in enumerate(label.tolist()):
        image[i, :, 4 * own : 4 * own + 4] += 5
    return ListStream(image.to(torch.uint8), label, rank, world)


def by_hand() -> np.ndarray:
    """bool[N,1+cells], clean first."""
    data, model, rows = stream(), Bands(), []
    for i in range(len(data.image)):
        image, own = data.image[i : i + 1], int(data.label[i])
        hits = [int(model(image).argmax()) == own]
        for name in NAMES:
            for severity in SEVERITIES:
                draw = SampleRandom(
                    0, f"robustness.{name}.{severity}", torch.zeros(1, dtype=torch.int64), torch.tensor([i])
                )
                hits.append(int(model(corrupted(image, name, severity, draw)).argmax()) == own)
        rows.append(hits)
    return np.array(rows)


def measure(rank: int = 0, world: int = 1):
    evaluation = Robustness(Config(head="logits", corruptions=NAMES, severities=SEVERITIES))
    ctx = context({"logits": Bands().eval()}, {"val": stream(rank, world)})
    with torch.no_grad():
        return list(evaluation.run(ctx))


def test_equals_one_image_at_a_time(lone_group):
    outputs = {output.name: output for output in measure() if not isinstance(output, Table | Figure)}
    (table,) = [output for output in measure() if isinstance(output, Table)]
    (figure,) = [output for output in measure() if isinstance(output, Figure)]
    right = by_hand()
    cells = right[:, 1:].reshape(-1, 3, 2)
    assert 0.4 < right[:, 0].mean() < 1 and cells.mean() < right[:, 0].mean()
    expected = {
        "clean": right[:, 0],
        "top1": cells.mean((1, 2)),
        "top1_severity1": cells[:, :, 0].mean(1),
        "top1_severity4": cells[:, :, 1].mean(1),
    } | {f"top1_{name}": cells[:, i].mean(1) for i, name in enumerate(NAMES)}
    assert outputs.keys() == {f"robustness/{name}" for name in (*expected, "retained")}
    for name, each in expected.items():
        found = outputs[f"robustness/{name}"]
        assert found.value == pytest.approx(each.mean()) and found.n == 31 and found.samples is not None
        np.testing.assert_allclose(found.samples, each, atol=1e-6)
        assert found.stderr == pytest.approx(each.std() / 31**0.5)
    assert outputs["robustness/retained"].value == pytest.approx(cells.mean() / right[:, 0].mean())
    assert table.columns == ("corruption", "severity 1", "severity 4", "mean")
    for row, name, own in zip(table.rows, NAMES, cells.mean(0), strict=True):
        assert row == (name, *map(pytest.approx, (*own, own.mean())))
    assert figure.image.std() > 1


def test_the_mean_corruption_error_is_relative_to_alexnets(lone_group, monkeypatch):
    """By hand, of rights that are made up: errors of a corruption over AlexNet's, and their mean; without frost."""
    right = torch.rand(40, 76, generator=torch.Generator().manual_seed(0)) < torch.linspace(0.3, 0.9, 76)
    monkeypatch.setattr(Robustness, "_right", lambda self, ctx, head: right)
    evaluation = Robustness(Config(head="logits", reference="alexnet"))
    with torch.no_grad():
        found = {o.name: o for o in evaluation.run(context({"logits": Bands().eval()}, {"val": stream()}))}
    ratios = []
    for i, name in enumerate(STANDARD):
        wrong = [1 - float(right[:, 1 + 5 * i + s].double().mean()) for s in range(5)]
        if name != "frost":
            ratios.append(sum(wrong) / (5 * ALEXNET[name]))
    assert len(ratios) == 14 and found["robustness/mce"].value == pytest.approx(sum(ratios) / 14)
    assert found["robustness/mce"].better == "lower"


def test_alexnets_errors_are_the_means_of_those_by_severity():
    """Of the three that are published severity by severity in a second place."""
    by_severity = {
        "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
        "brightness": (0.4514, 0.48502, 0.54048, 0.62166, 0.7244),
        "jpeg_compression": (0.51, 0.547, 0.573, 0.655, 0.748),
    }
    for name, errors in by_severity.items():
        assert ALEXNET[name] == pytest.approx(np.mean(errors), abs=2e-4)
    assert list(ALEXNET) == [name for name in STANDARD if name != "frost"]


def on_a_rank() -> list:
    with process_group(1.0) as place:
        found = [o for o in measure(place.rank, place.world_size) if not isinstance(o, Table | Figure)]
    return [(o.name, o.value, o.stderr, None if o.samples is None else o.samples.tolist()) for o in found]


def test_the_number_of_ranks_does_not_matter():
    first, *others = [e.value for world in (1, 3) for e in start_ranks(world, on_a_rank)]
    assert first and others == [first] * 3


def test_what_makes_no_sense_is_refused(lone_group):
    with pytest.raises(ValidationError, match="there is no corruption 'rain'"):
        Config(corruptions=("rain",))
    with pytest.raises(ValidationError, match="named twice"):
        Config(severities=(1, 1))
    with pytest.raises(ConfigError, match="ImageNet's 1000 classes, and stream 'val' has 3"):
        numbers(Robustness(Config(head="logits", reference="alexnet")), context({"logits": Bands()}, {"val": stream()}))
    many = stream()
    many.classes = tuple(map(str, range(1000)))
    for settings in ({"corruptions": ("fog",)}, {"severities": (1,)}):
        with pytest.raises(ConfigError, match="over all severities and corruptions"):
            numbers(
                Robustness(Config.model_validate(settings | {"head": "logits", "reference": "alexnet"})),
                context({"logits": Bands()}, {"val": many}),
            )
    assert robustness.IMAGENET == 1000
