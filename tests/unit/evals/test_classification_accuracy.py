"""A classifier trained on made images, beside the same one trained on real ones: as a plain training would have it."""

import os
from contextlib import closing

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline.config.durations import Duration
from pipeline.config.schema import Component, Image, Optimizer, Training
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.manifest import load
from pipeline.data.evaluation import open_eval
from pipeline.dist.group import gather_objects, process_group
from pipeline.evals._written import write
from pipeline.evals.classification_accuracy import ClassificationAccuracy, Config
from tests.contracts.components import context, numbers
from tests.unit.evals.generated import CLASSES, encoders, grey, real

NAMES = tuple(f"class {i}" for i in range(CLASSES))
CLASSIFIER = Component.model_validate({
    "name": "supervised", "encoder": "resnet18",
    "encoder_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
})  # fmt: skip
TRAINING = Training(
    length=Duration(50, "ba"),
    global_batch=16,
    optimizer=Optimizer(name="adamw", lr=2e-2, weight_decay=0.0),
    image=Image(size=4, crop="resize"),
    workers=0,
)


class Painter(nn.Module):
    """Greys of the classes that it is asked for, but for those in ``deaf``, which it paints as the first one."""

    classes, told = CLASSES, "label"

    def __init__(self, deaf=()):
        super().__init__()
        self.zero, self.deaf = nn.Parameter(torch.zeros(())), list(deaf)

    def settings(self, values):
        return None

    def make(self, ids, prompt, seed, settings):
        label = prompt["label"]
        x = grey(torch.where(torch.isin(label, torch.tensor(self.deaf, dtype=torch.int64)), 0, label))
        x = x.view(-1, 1, 1, 1) + 0.05 * torch.randn(len(ids), 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def measured(maker, folder, **settings):
    config = Config(samples=80, batch=16, classifier=CLASSIFIER, training=TRAINING, **settings)
    streams = {"train": real(100, seed=1), "val": real(45)}
    ctx = context({"generator": maker}, streams, NAMES, folder=folder)
    return numbers(ClassificationAccuracy(config), ctx)


def test_what_the_model_leaves_out_the_classifier_cannot_learn(lone_group, tmp_path):
    good = measured(Painter(), tmp_path)
    assert good["classification_accuracy/top1"].value > 0.9 and good["classification_accuracy/top1"].n == 45
    assert good["classification_accuracy/top1_real"].value > 0.9
    assert abs(good["classification_accuracy/gap"].value) <= 0.1
    deaf = measured(Painter(deaf=(3, 4)), tmp_path)
    top1, gap = deaf["classification_accuracy/top1"], deaf["classification_accuracy/gap"]
    # the three look alike in training, and only the first of them looks so in the test: two classes cannot be known
    assert top1.value <= 0.62 and gap.value >= 0.3 and gap.better == "lower"
    labels = torch.arange(45) % CLASSES
    assert not top1.samples[labels.numpy() >= 3].any() and top1.samples[(labels == 2).numpy()].all()
    other = deaf["classification_accuracy/top1_real"]
    assert gap.samples.tolist() == (other.samples.astype(float) - top1.samples).tolist()
    assert gap.value == pytest.approx(other.value - top1.value) and gap.stderr > 0
    assert not os.listdir(tmp_path), "what was written to train on is removed"


def test_without_the_other_one_nothing_real_is_trained_on(lone_group, tmp_path):
    found = measured(Painter(), tmp_path, baseline=False)
    assert not [name for name in found if name.endswith(("_real", "gap"))]
    assert ClassificationAccuracy(Config(baseline=False)).uses().streams.keys() == {"val"}


def test_images_are_written_as_they_are_with_their_labels(lone_group, tmp_path):
    images = torch.randint(0, 256, (23, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ids, label = torch.arange(23).flip(0) * 7, torch.arange(23) % 2 * 2  # no sample of the class between
    data = write([(ids[:9], images[:9], label[:9]), (ids[9:], images[9:], label[9:])], ("a", "b", "c"), tmp_path / "x")
    assert load(data).classes == ("a", "b", "c") and load(data).samples == 23
    image = Image(size=(6, 5), crop="resize")
    with closing(open_eval(data, image, ("image", "label"), batch=8, workers=0)) as stream:
        batches = list(stream)
    assert torch.equal(torch.cat([b["image"] for b in batches]), images.flip(0))
    assert torch.equal(torch.cat([b["label"] for b in batches]), label.flip(0))
    grey = write([(ids[:1], images[:1, :1], label[:1])], ("a", "b", "c"), tmp_path / "x")
    assert load(grey).samples == 1, "what was there is removed"


def test_what_cannot_be_is_refused(lone_group, tmp_path):
    def check(maker=None, **settings):
        streams = {"train": real(100), "val": real(9)}
        ctx = context({"generator": maker or Painter()}, streams, NAMES, folder=tmp_path)
        ClassificationAccuracy(Config(**{"samples": 80, "classifier": CLASSIFIER} | settings)).check(ctx)

    check()
    with pytest.raises(ConfigError, match=r"samples = 101: stream 'train' has 100 real images"):
        check(samples=101)
    check(samples=101, baseline=False)
    with pytest.raises(ConfigError, match=r"classifier.encoder_arg: unknown key"):
        check(classifier=Component.model_validate({"name": "supervised", "encoder_arg": {}}))
    with pytest.raises(ConfigError, match=r"'mae' offers no logits; name a classifier"):
        check(classifier=Component.model_validate({"name": "mae", "decoder_depth": 1}))
    with pytest.raises(ConfigError, match=r'needs a model that was trained with condition = "class"'):
        check(maker=encoders(classes=0)["generator"])


def test_a_disk_that_takes_nothing_is_an_error_on_all_ranks(lone_group, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write images into"):
        write([], ("a", "b"), tmp_path / "file" / "x")


@pytest.mark.world_size(2)
def test_ranks_write_and_train_together(tmp_path):
    """What they give is the same on both; what is trained is not held to one rank's last digits."""
    with process_group(timeout_minutes=1):
        rank = dist.get_rank()
        streams = {"train": real(100, rank=rank, world=2, seed=1), "val": real(45, rank=rank, world=2)}
        ctx = context({"generator": Painter()}, streams, NAMES, folder=tmp_path)
        mine = torch.arange(rank, 21, 2)
        image = mine.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
        data = write([(mine, image, mine % CLASSES)] if rank else [], NAMES, tmp_path / "x")
        assert load(data).samples == 10  # the other rank has none
        short = TRAINING.model_copy(update={"length": Duration(3, "ba")})
        found = numbers(ClassificationAccuracy(Config(samples=80, classifier=CLASSIFIER, training=short)), ctx)
        values = gather_objects([(number.name, number.value, number.n) for number in found.values()])
        assert values[0] == values[1] and found["classification_accuracy/top1"].n == 45
        with pytest.raises(DataError, match="no such sample"):
            write(broken() if rank else [], NAMES, tmp_path / "y")


def broken():
    raise DataError("no such sample")
    yield
