"""The linear classifier of patches against a plain loop, its counts against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score
from torch import nn
from torch.nn import functional

from pipeline.core.errors import ConfigError, DataError
from pipeline.core.evaluation import Figure, Table
from pipeline.dist.group import process_group
from pipeline.evals import segmentation
from pipeline.evals.segmentation import Config, Segmentation
from tests.contracts.components import ListStream, context, numbers
from tests.ranks import start_ranks

CLASSES, SIDE, CELL = 4, 16, 4


class Scenes(ListStream):
    """Each cell of 4 x 4 pixels has one colour; its class is that of the colour, or 255 where nobody knows."""

    def __init__(self, n: int, seed: int, rank: int = 0, world: int = 1, noise: float = 60.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        palette = torch.tensor([[30, 40, 200], [200, 60, 40], [60, 190, 60], [200, 200, 180]]).float()
        cells = torch.randint(0, CLASSES, (n, SIDE // CELL, SIDE // CELL), generator=generator)
        colour = palette[cells] + noise * torch.randn(*cells.shape, 3, generator=generator)
        image = colour.clamp(0, 255).to(torch.uint8).permute(0, 3, 1, 2)
        image = image.repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)
        super().__init__(image, torch.zeros(n, dtype=torch.int64), rank, world)
        self.mask = cells.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2).to(torch.uint8)
        self.mask[:, :2] = 255
        self.classes = ("ground", "b", "c", "d")

    def __iter__(self):
        return (batch | {"mask": self.mask[batch["id"]]} for batch in super().__iter__())


class Colours(nn.Module):
    """Patches are the mean colours of cells."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))


def cells(encoder: nn.Module, image: torch.Tensor) -> torch.Tensor:
    return functional.avg_pool2d(image.float() / 255, CELL) + encoder.shift[:, None, None]


@pytest.fixture
def colours(monkeypatch):
    monkeypatch.setattr(segmentation, "patches", cells)


def measured(rank: int = 0, world: int = 1, **settings):
    streams = {"train": Scenes(13, 0, rank, world), "val": Scenes(9, 1, rank, world)}
    evaluation = Segmentation(Config(**{"steps": 30, "batch": 4, "lr": 0.05} | settings))
    with torch.no_grad():
        return list(evaluation.run(context({"image": Colours().eval()}, streams)))


def plain(steps: int, batch: int, lr: float, decay: float):
    """Batches as they come, with torch's own batch norm in eval mode, autograd and AdamW."""
    data = Scenes(13, 0)
    x, mask = cells(Colours(), data.image).detach(), data.mask.long()
    norm = nn.BatchNorm2d(3, affine=False).eval()
    norm.running_mean, norm.running_var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    layer = nn.Conv2d(3, CLASSES, 1)
    nn.init.normal_(layer.weight, std=0.01, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, weight_decay=decay)
    generator, order = torch.Generator().manual_seed(0), []
    for step in range(steps):
        while len(order) < batch:
            order += torch.randperm(13, generator=generator).tolist()
        chosen, order = order[:batch], order[batch:]
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + np.cos(np.pi * step / steps))
        logits = functional.interpolate(layer(norm(x[chosen])), size=(SIDE, SIDE), mode="bilinear")
        loss = functional.cross_entropy(logits, mask[chosen], ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    val = Scenes(9, 1)
    with torch.no_grad():
        logits = layer(norm(cells(Colours(), val.image)))
        return functional.interpolate(logits, size=(SIDE, SIDE), mode="bilinear").argmax(1).numpy(), val


def test_equals_a_plain_loop_counted_by_scikit_learn(lone_group, colours):
    outputs = measured(steps=7, weight_decay=0.1)
    found = {o.name: o for o in outputs if not isinstance(o, Table | Figure)}
    guess, val = plain(7, 4, 0.05, 0.1)
    counted = val.mask.numpy() != 255
    truth, own = val.mask.numpy()[counted], guess[counted]
    iou = jaccard_score(truth, own, average=None, labels=range(CLASSES))
    assert 0.3 < iou.mean() < 0.95
    assert found["segmentation/miou"].value == pytest.approx(iou.mean(), abs=1e-9)
    assert found["segmentation/pixel_accuracy"].value == pytest.approx((truth == own).mean())
    table = confusion_matrix(truth, own, labels=range(CLASSES))
    recall = table.diagonal() / table.sum(1)
    assert found["segmentation/mean_class_accuracy"].value == pytest.approx(recall.mean())
    (rows,) = [o.rows for o in outputs if isinstance(o, Table)]
    assert [row[0] for row in rows] == ["ground", "b", "c", "d"]
    for row, i, r, count in zip(rows, iou, recall, table.sum(1), strict=True):
        assert row[1:] == (count, pytest.approx(i), pytest.approx(r))


def test_colours_are_learnt_and_shown(lone_group, colours):
    outputs = measured(steps=200)
    assert next(o for o in outputs if o.name == "segmentation/miou").value > 0.6
    (figure,) = [o for o in outputs if isinstance(o, Figure)]
    assert figure.image.shape == (6 * SIDE * 2, 3 * SIDE * 2, 3)
    first = Scenes(9, 1)
    assert np.array_equal(figure.image[: 2 * SIDE : 2, : 2 * SIDE : 2], first.image[0].permute(1, 2, 0).numpy())
    mask = figure.image[: 2 * SIDE : 2, 2 * SIDE : 4 * SIDE : 2]
    assert (mask[:2] == 0).all()
    pairs = np.concatenate([mask[2:].reshape(-1, 3), first.mask[0].numpy()[2:].reshape(-1, 1)], axis=1)
    assert len(np.unique(pairs, axis=0)) == len(np.unique(pairs[:, :3], axis=0)) == len(np.unique(pairs[:, 3])) > 2


def test_a_class_that_nobody_has_counts_in_no_mean(lone_group, colours):
    with_more = {o.name: o for o in measured(classes=6, steps=60) if not isinstance(o, Table | Figure)}
    (table,) = [o for o in measured(classes=6, steps=60) if isinstance(o, Table)]
    assert [row[0] for row in table.rows] == ["0", "1", "2", "3"]
    assert with_more["segmentation/miou"].value == pytest.approx(np.mean([row[2] for row in table.rows]))


def on_a_rank() -> list:
    segmentation.patches = cells
    with process_group(1.0) as place:
        outputs = measured(place.rank, place.world_size)
    return [[o.name, o.image.tolist() if isinstance(o, Figure) else list(o)[1:3]] for o in outputs]


def test_the_number_of_ranks_does_not_matter():
    first, *others = [e.value for world in (1, 3) for e in start_ranks(world, on_a_rank)]
    assert first and others == [first] * 3


def test_what_makes_no_sense_is_refused(lone_group, colours):
    with pytest.raises(DataError, match="a mask of stream 'train' has the value 255, but there are 4 classes"):
        measured(ignore=None)
    with pytest.raises(DataError, match="has the value 3, but there are 3 classes"):
        measured(classes=3)
    nameless = Scenes(5, 0)
    nameless.classes = ()
    with pytest.raises(ConfigError, match=r"segmentation\.classes: stream 'train' names no classes"):
        numbers(Segmentation(Config()), context({"image": Colours()}, {"train": nameless, "val": nameless}))
