import pytest
import torch
from torch import nn

from pipeline.core.errors import CheckpointError, ConfigError, DataError
from pipeline.core.evaluation import OWN, Reading, Table
from pipeline.evals._heads import Course, Head, Heads
from pipeline.evals.linear_probe import RATES, Config, LinearProbe, laid_out, readings_of, whole
from pipeline.nn.encoder import ImageEncoder, create_backbone
from pipeline.nn.images import Normalize
from tests.contracts.components import ListStream, context
from tests.unit.evals.test_knn import Identity, make_streams
from tests.unit.nn.test_reading import RESNET, VIT

CPU = torch.device("cpu")


def data(samples=120, dim=12, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, (samples,), generator=generator)
    centre = torch.randn(classes, dim, generator=torch.Generator().manual_seed(9))
    return 0.7 * centre[label] + torch.randn(samples, dim, generator=generator) + 3.0, label


def plain(x, label, classes, rate, batch, steps, norm, seed):
    """The same head as torch's own parts train it, with the recipe of DINOv2's linear probe."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(x.shape[1], classes).double()
    with torch.no_grad():
        linear.weight.copy_(0.01 * torch.randn(x.shape[1], classes, generator=generator).T)
        linear.bias.zero_()
    model = nn.Sequential(
        nn.BatchNorm1d(x.shape[1], affine=False, eps=1e-6).double() if norm else nn.Identity(), linear
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=rate * batch / 256, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0)
    draws, order = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(x), generator=draws).tolist()
        chosen, order = order[:batch], order[batch:]
        loss = nn.functional.cross_entropy(model(x[chosen].double()), label[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch norm"])
@pytest.mark.parametrize("batch", [32, 50])
def test_a_head_equals_one_that_torchs_optimizer_and_schedule_train(norm, batch):
    x, label = data()
    heads = Heads([Head(0.5, OWN)], {OWN: slice(0, 12)}, 5, Course(40, batch, norm, 3), CPU)
    heads.train(x, label, torch.arange(len(x)))
    expected = plain(x, label, 5, 0.5, batch, 40, norm, 3)
    test, _ = data(seed=1)
    scores = heads.head(0).scores(test)
    torch.testing.assert_close(scores.double(), expected(test.double()).detach(), rtol=1e-3, atol=1e-4)
    assert scores.std() > 0.5


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch norm"])
def test_heads_of_a_grid_end_where_they_end_alone(norm):
    x, label = data()
    columns = {Reading(1, "cls"): slice(4, 8), Reading(2, "cls+mean"): slice(0, 12), OWN: slice(2, 9)}
    grid = [Head(rate, reading) for rate in (1e-3, 0.1, 1.0) for reading in columns]
    course = Course(60, 32, norm, 0)
    together = Heads(grid, columns, 5, course, CPU)
    together.train(x, label, torch.arange(len(x)))
    held = torch.arange(100, 120)
    for number, head in enumerate(grid):
        alone = Heads([head], columns, 5, course, CPU)
        alone.train(x, label, torch.arange(len(x)))
        for ours, theirs in zip(together.head(number), alone.head(0), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert together.hits(x, label, held)[number] == alone.hits(x, label, held)[0]
        right = alone.head(0).scores(x[held][:, columns[head.reading]]).argmax(1) == label[held]
        assert together.hits(x, label, held)[number] == int(right.sum())
    assert len({tuple(together.head(n).bias.tolist()) for n in range(9)}) == 9


def test_a_head_that_diverges_takes_no_other_with_it():
    x, label = data()
    columns = {OWN: slice(0, 12)}
    wild = Heads([Head(1e38, OWN), Head(0.1, OWN)], columns, 5, Course(60, 32, False, 0), CPU)
    wild.train(x, label, torch.arange(len(x)))
    tame = Heads([Head(0.1, OWN)], columns, 5, Course(60, 32, False, 0), CPU)
    tame.train(x, label, torch.arange(len(x)))
    everything = torch.arange(len(x))
    assert wild.hits(x, label, everything) == [0, *tame.hits(x, label, everything)]


def test_the_default_grid_is_that_of_dinov2():
    assert len(RATES) == 13 and RATES[0] == 1e-5 and RATES[-1] == 0.1
    deep = encoder(replace_depth(VIT, 4))
    readings = readings_of(None, None, deep)
    assert readings == [Reading(n, pool) for pool in ("cls", "cls+mean") for n in (1, 4)]
    assert len(readings) * len(RATES) == 52 and whole(readings) == [Reading(4, "cls+mean")]
    assert readings_of(None, None, encoder(VIT)) == [Reading(1, "cls"), Reading(1, "cls+mean")]  # it has three blocks
    assert readings_of(None, None, encoder(RESNET)) == [OWN, Reading(1, "mean")]
    assert readings_of(None, None, Identity()) == [OWN]


def replace_depth(config, depth):
    return config.model_copy(update={"encoder_args": {**config.encoder_args, "depth": depth}})


def encoder(config):
    torch.manual_seed(0)
    return ImageEncoder(Normalize(config.mean, config.std), create_backbone(config, (32, 48)), "native").eval()


@pytest.mark.parametrize(
    ("settings", "model", "said"),
    [
        ({"pool": ["cls"]}, RESNET, r"no class token for 'cls'; take \"own\" or \"mean\""),
        ({"blocks": [5]}, VIT, "5 are to be read, and the encoder has 3"),
        ({"blocks": [1]}, RESNET, "no class token that blocks could give"),
        ({"pool": ["mean"]}, None, r"no blocks of this encoder can be read for 'mean'; take \"own\""),
    ],
)
def test_readings_that_an_encoder_does_not_offer_are_refused(lone_group, settings, model, said):
    ctx = context({"image": Identity() if model is None else encoder(model)}, make_streams())
    with pytest.raises(ConfigError, match=said):
        LinearProbe(Config(**settings)).check(ctx)


def images(samples, seed):
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(samples) % 3
    image = torch.randint(0, 120, (samples, 3, 32, 48), dtype=torch.uint8, generator=generator)
    for number in range(3):
        image[label == number, number] += 60
    return ListStream(image, label)


def test_columns_hold_the_readings(lone_group):
    readings = [OWN, Reading(1, "cls"), Reading(3, "cls"), Reading(1, "mean"), Reading(2, "cls+mean")]
    ctx = context({"image": encoder(VIT)}, {"val": images(7, 0)})
    with torch.no_grad():
        features, columns = laid_out(readings, ctx.readings("image", "val", whole(readings)))
        expected = ctx.readings("image", "val", readings)
    assert features.x.shape[1] == (3 + 1 + 1) * 24
    for reading in readings:
        torch.testing.assert_close(features.x[:, columns[reading]], expected[reading].x, rtol=0, atol=0)


def probed(streams, folder, model=None, **settings):
    ctx = context({"image": model or Identity()}, streams, folder=folder)
    evaluation = LinearProbe(Config(**settings))
    with torch.no_grad():
        evaluation.check(ctx)
        return {o.name.removeprefix("linear_probe/"): o for o in evaluation.run(ctx)}


def test_the_winner_of_the_held_out_part_is_trained_on_all_and_tested(lone_group, tmp_path):
    streams = make_streams(samples=(200, 80))
    rates = (1e-4, 1e-2, 0.3, 3.0)
    found = probed(streams, tmp_path, rates=rates, steps=50, batch=64, seed=1)
    train, test = streams["train"], streams["val"]
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    held, rest = order[:20], order[20:]
    models = [plain(train.image[rest], train.label[rest], 6, rate, 64, 50, False, 1) for rate in rates]
    reached = [(m(train.image[held].double()).argmax(1) == train.label[held]).double().mean().item() for m in models]
    table = found["heads"]
    assert isinstance(table, Table) and [row[3] for row in table.rows] == pytest.approx(reached)
    assert max(reached) > min(reached)
    best = reached.index(max(reached))
    assert [row[4] for row in table.rows].index("chosen") == best and found["rate"].value == rates[best]
    final = plain(train.image, train.label, 6, rates[best], 64, 50, False, 1)
    guess = final(test.image.double()).argmax(1)
    assert found["top1"].samples.tolist() == (guess == test.label).tolist() and found["top1"].n == 80


def test_the_winner_at_the_edge_is_flagged_and_the_test_stream_has_no_say(lone_group, tmp_path):
    streams = make_streams(samples=(200, 80))
    low = probed(streams, tmp_path, rates=(1e-9, 1e-1), steps=50)
    assert low["rate"].value == 1e-1 and low["rate_at_edge"].value == 1
    inside = probed(streams, tmp_path, rates=(1e-9, 1e-1, 1e30), steps=50)
    assert inside["rate"].value == 1e-1 and inside["rate_at_edge"].value == 0
    streams["val"].label = streams["val"].label.flip(0)
    assert probed(streams, tmp_path, rates=(1e-9, 1e-1, 1e30), steps=50)["heads"] == inside["heads"]


def test_a_kept_head_gives_the_same_numbers_without_the_training_stream(lone_group, tmp_path):
    streams, model = {"train": images(90, 0), "val": images(40, 1)}, encoder(VIT)
    first = probed(streams, tmp_path, model, rates=(0.01, 0.1), steps=30, batch_norm=True)
    del streams["train"]
    again = probed(streams, tmp_path / "other", model, head=str(tmp_path))
    assert again["top1"].samples.tolist() == first["top1"].samples.tolist()
    assert again["confusion"] == first["confusion"] and first["top1"].value > 0.4
    file = str(tmp_path / "head.safetensors")
    assert probed(streams, tmp_path, model, head=file)["top1"].value == first["top1"].value
    assert LinearProbe(Config(head=file)).uses().streams == {"val": ("image", "label")}


def test_a_kept_head_is_refused_by_what_it_does_not_fit(lone_group, tmp_path):
    streams, model = {"train": images(90, 0), "val": images(40, 1)}, encoder(VIT)
    probed(streams, tmp_path, model, rates=(0.1,), steps=5, pool=("cls",), blocks=(2,))
    other = encoder(VIT)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(ConfigError, match="trained on an encoder with other weights"):
        probed(streams, tmp_path, other, head=str(tmp_path))
    with pytest.raises(ConfigError, match="reads 'cls' of 2 blocks, not what the settings say"):
        probed(streams, tmp_path, model, head=str(tmp_path), pool=("cls+mean",))
    with pytest.raises(ConfigError, match="reads 'cls' of 2 blocks"):
        probed(streams, tmp_path, model, head=str(tmp_path), blocks=(1,))
    streams["val"].classes = ("class 0", "class 1", "gnu")
    with pytest.raises(DataError, match="'gnu', which the head does not know"):
        probed(streams, tmp_path, model, head=str(tmp_path))
    with pytest.raises(CheckpointError, match="cannot read weights from"):
        probed(streams, tmp_path, model, head=str(tmp_path / "nothing"))
    nn_file = tmp_path / "weights.safetensors"
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3, 24), "bias": torch.zeros(3)}, nn_file)
    with pytest.raises(CheckpointError, match="holds no head of a linear probe"):
        probed(streams, tmp_path, model, head=str(nn_file))


def test_too_little_missing_classes_and_divergence_are_data_errors(lone_group, tmp_path):
    x, label = torch.randn(30, 4), torch.zeros(30, dtype=torch.int64)
    with pytest.raises(DataError, match="30 samples of 1 classes; a probe needs two classes"):
        probed({"train": ListStream(x, label), "val": ListStream(x, label)}, tmp_path, steps=2)
    streams = make_streams()
    streams["train"].label[streams["train"].label == 2] = 3
    streams["val"].label[0] = 2
    with pytest.raises(DataError, match="'val' has samples of class 'class 2', of which stream 'train' has none"):
        probed(streams, tmp_path, steps=2)
    with pytest.raises(DataError, match="they have diverged"):
        probed(make_streams(), tmp_path, rates=(1e37, 1e38), steps=30)
