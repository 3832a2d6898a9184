import io
import math

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import nn

from pipeline.core.errors import ConfigError
from pipeline.core.evaluation import Bits, Features
from pipeline.evals.ood import OOD, Config, Gaussians, Neighbours, separation
from tests.contracts.components import ListStream, context, numbers
from tests.unit.evals.test_knn import Identity

CLASSES, DIM = 3, 5


class Logits(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(DIM, CLASSES, generator=torch.Generator().manual_seed(7)))

    def forward(self, image):
        return image @ self.weight


def streams():
    """Two streams of three uneven clouds, and one of points elsewhere."""
    generator = torch.Generator().manual_seed(5)
    centre = 2 * torch.randn(CLASSES, DIM, generator=generator)
    mix = torch.randn(DIM, DIM, generator=generator)
    found = {}
    for name, n in (("train", 60), ("val", 37), ("far", 23)):
        label = torch.arange(n) % CLASSES
        noise = torch.randn(n, DIM, generator=generator) @ mix * 0.5
        found[name] = ListStream(noise + (centre[label] if name != "far" else 3 * noise), label)
        found[name].fingerprint = name
    return found


def by_hand(data, way, k=4):
    """A score of each sample, larger for what is known, in float64 and one sample at a time."""
    train = data["train"]
    weight = Logits().weight.detach().double()
    x = train.image.double()
    means = torch.stack([x[train.label == c].mean(0) for c in range(CLASSES)])
    rest = torch.stack([row - means[c] for row, c in zip(x, train.label.tolist(), strict=True)])
    covariance = sum(torch.outer(row, row) for row in rest) / len(x)
    inverse = torch.linalg.inv(covariance + 1e-5 * covariance.diagonal().mean() * torch.eye(DIM, dtype=torch.float64))

    def score(row):
        logits = [math.exp(v) for v in (row @ weight).tolist()]
        if way == "msp":
            return max(logits) / sum(logits)
        if way == "energy":
            return math.log(sum(logits))
        if way == "knn":
            return -sorted(float((row / row.norm() - other / other.norm()).norm()) for other in x)[k - 1]
        return -min(float((row - mean) @ inverse @ (row - mean)) for mean in means)

    return {name: [score(row) for row in data[name].image.double()] for name in ("val", "far")}


def pairs(known, unknown):
    """AUROC as the share of pairs in the right order."""
    return sum((a > b) + 0.5 * (a == b) for a in known for b in unknown) / len(known) / len(unknown)


@pytest.mark.parametrize("way", ["msp", "energy", "knn", "mahalanobis"])
def test_equals_one_sample_at_a_time(lone_group, way):
    data = streams()
    evaluation = OOD(Config(unknown=("far",), ways=(way,), k=4))
    wanted = {"image": Identity(), "logits": Logits().eval()}
    encoders = {name: wanted[name] for name in evaluation.uses().encoders}
    found = numbers(evaluation, context(encoders, {n: data[n] for n in evaluation.uses().streams}))
    scores = by_hand(data, way)
    auroc, passing = found[f"ood/auroc_{way}_far"], found[f"ood/fpr95_{way}_far"]
    assert auroc.value == pytest.approx(pairs(scores["val"], scores["far"]), abs=1e-9) and auroc.n == 37 + 23
    threshold = sorted(scores["val"], reverse=True)[math.ceil(0.95 * 37) - 1]
    expected = sum(s >= threshold for s in scores["far"]) / 23
    assert passing.value == pytest.approx(expected) and passing.n == 23 and passing.better == "lower"
    assert passing.samples.tolist() == [s >= threshold for s in scores["far"]]


def test_distances_are_those_of_the_formulas():
    data = streams()
    train = Features(data["train"].image, {"label": data["train"].label}, data["train"].classes)
    for way, near in (("knn", Neighbours(train, 4)), ("mahalanobis", Gaussians(train))):
        found, expected = near(data["far"].image), by_hand(data, way)["far"]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-8)


def test_far_points_are_told_by_their_distance(lone_group):
    data = streams()
    data["far"].image += 50
    found = numbers(OOD(Config(unknown=("far",), ways=("mahalanobis",))), context({"image": Identity()}, data))
    assert found["ood/auroc_mahalanobis_far"].value == 1.0 and found["ood/fpr95_mahalanobis_far"].value == 0.0


def test_so_many_known_samples_pass_and_no_fewer():
    known = torch.arange(100).double().numpy()
    assert separation(known, known - 5)[1].mean() == 0.90  # 5 to 99 pass, and 90 of -5 to 94 are among them
    auroc, passes = separation(known, known + 1000)
    assert auroc == 0.0 and passes.all()


class Flat(nn.Module):
    """Finds dark images likely: bits are the mean value of the image, divided by 32."""

    classes, told, image_shape = 0, None, (3, 8, 8)

    def __init__(self):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(1))

    def settings(self, values):
        return None

    def make(self, ids, prompt, seed, settings):
        raise AssertionError("nothing is made")

    def check_likelihood(self, steps):
        if steps is not None:
            raise ConfigError("no steps")

    def likelihood(self, image, ids, prompt, seed, steps):
        return Bits("exact", {"": image.double().mean(dim=(1, 2, 3)) / 32})


def pictures():
    """Noise of any brightness, and flat greys that are darker on average: simpler, and likelier to the model above."""
    generator, found = torch.Generator().manual_seed(3), {}
    for name, n in (("train", 40), ("val", 31), ("far", 17)):
        top = torch.randint(128, 256, (n, 1, 1, 1), generator=generator)
        noise = torch.rand(n, 3, 8, 8, generator=generator)
        image = (noise * top if name != "far" else top // 4 + 0 * noise).to(torch.uint8)
        found[name] = ListStream(image, torch.arange(n) % CLASSES)
        found[name].fingerprint = name
    return found


def test_bits_of_a_model_are_scores_and_simple_images_look_known(lone_group):
    data = pictures()
    ways = ("likelihood", "complexity", "typicality")
    evaluation = OOD(Config(unknown=("far",), ways=ways))
    assert evaluation.uses().encoders == ("generator",) and "train" in evaluation.uses().streams
    found = numbers(evaluation, context({"generator": Flat()}, data))
    bits = {name: stream.image.double().mean(dim=(1, 2, 3)) / 32 for name, stream in data.items()}
    png = {name: [] for name in data}
    for name, stream in data.items():
        for image in stream.image:
            file = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG", optimize=True)
            png[name].append(8 * len(file.getvalue()) / 192)
    usual = float(bits["train"].mean())
    by_way = {
        "likelihood": {n: (-b).tolist() for n, b in bits.items()},
        "complexity": {n: [p - float(v) for p, v in zip(png[n], b, strict=True)] for n, b in bits.items()},
        "typicality": {n: [-abs(float(v) - usual) for v in b] for n, b in bits.items()},
    }
    for way, scores in by_way.items():
        auroc = found[f"ood/auroc_{way}_far"].value
        assert auroc == pytest.approx(pairs(scores["val"], scores["far"]), abs=1e-9), way
    assert found["ood/auroc_likelihood_far"].value < 0.1 and found["ood/auroc_complexity_far"].value > 0.95
    for name in ("val", "far", "train"):
        number = found[f"ood/bits_per_dim_exact_{name}"]
        assert number.value == pytest.approx(float(bits[name].mean())) and number.better is None
    far, dearer = found["ood/bits_per_dim_exact_far"], found["ood/bits_per_dim_exact_val"]
    assert far.n == 17 and far.value < dearer.value and far.stderr < 0.2


def test_models_that_are_told_what_images_are_cannot_say_how_likely_unknown_ones_are(lone_group):
    model, evaluation = Flat(), OOD(Config(unknown=("far",), ways=("likelihood",)))
    model.told = "label"
    with pytest.raises(ConfigError, match=r'ood\.ways: the model is told the "label" of an image'):
        numbers(evaluation, context({"generator": model}, pictures()))
    with pytest.raises(ConfigError, match="no steps"):
        numbers(
            OOD(Config(unknown=("far",), ways=("likelihood",), steps=4)), context({"generator": Flat()}, pictures())
        )
    with pytest.raises(ConfigError, match="needs a model that knows how likely images are"):
        numbers(evaluation, context({"generator": Identity()}, pictures()))


def test_what_makes_no_sense_is_refused(lone_group):
    with pytest.raises(ValidationError, match="cannot be 'unknown' too"):
        Config(unknown=("val",))
    data = streams()
    with pytest.raises(ConfigError, match=r"ood\.k: stream 'train' has no 61 samples"):
        numbers(OOD(Config(unknown=("far",), k=61)), context({"image": Identity()}, data))
    data["far"].fingerprint = "val"
    with pytest.raises(ConfigError, match=r"ood\.unknown: stream 'far' is the same data as 'val'"):
        numbers(OOD(Config(unknown=("far",), k=4)), context({"image": Identity()}, data))
