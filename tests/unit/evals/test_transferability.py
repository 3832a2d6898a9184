"""Scores of how well features fit labels, against the integrals and sums that they are defined by."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from pipeline.core.errors import DataError
from pipeline.evals.transferability import AtBlock, Config, Transferability, leep, logme
from pipeline.nn.encoder import EncoderConfig, ImageEncoder, create_backbone
from pipeline.nn.images import Normalize
from tests.contracts.components import ListStream, context, numbers


def evidence(x, y):
    """The largest log-density of y under N(0, F F^T / alpha + I / beta), per sample, by direct maximisation."""

    def negative(logs):
        alpha, beta = np.exp(logs)
        covariance = x @ x.T / alpha + np.eye(len(x)) / beta
        sign, determinant = np.linalg.slogdet(covariance)
        assert sign > 0
        return 0.5 * (y @ np.linalg.solve(covariance, y) + determinant + len(y) * math.log(2 * math.pi))

    best = min(
        minimize(negative, start, method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-10, "maxiter": 4000}).fun
        for start in ([0.0, 0.0], [3.0, 3.0])
    )
    return -best / len(y)


@pytest.mark.parametrize(("samples", "width", "off"), [(40, 5, 2e-4), (12, 20, 5e-3)])
def test_logme_is_the_maximal_evidence(samples, width, off):
    """With more features than samples the maximum is flat, and the iteration ends on the way to it."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(samples) % 3
    x = torch.randn(samples, width, generator=generator, dtype=torch.float64)
    x[:, :3] += torch.nn.functional.one_hot(label, 3)
    expected = np.mean([evidence(x.numpy(), (label == k).double().numpy()) for k in range(3)])
    assert logme(x, label, 3) == pytest.approx(expected, abs=off)
    # A turn changes nothing, and features that know more of the labels score higher.
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    assert logme(x @ turn, label, 3) == pytest.approx(logme(x, label, 3), abs=1e-6)
    better = x.clone()
    better[:, :3] += 2 * torch.nn.functional.one_hot(label, 3)
    assert logme(better, label, 3) > logme(x, label, 3) + 0.1


def test_leep_by_loops():
    generator = torch.Generator().manual_seed(1)
    posterior = torch.rand(9, 4, generator=generator).softmax(dim=1)
    label = [0, 1, 2, 0, 1, 2, 0, 0, 1]
    total = 0.0
    for n in range(9):
        chance = 0.0
        for z in range(4):
            of_label = sum(float(posterior[m, z]) for m in range(9) if label[m] == label[n])
            chance += of_label / sum(float(posterior[m, z]) for m in range(9)) * float(posterior[n, z])
        total += math.log(chance) / 9
    assert leep(posterior, torch.tensor(label), 3) == pytest.approx(total, rel=1e-5)
    assert leep(torch.eye(3)[label], torch.tensor(label), 3) == pytest.approx(0, abs=1e-9)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    args = {"patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}
    backbone = create_backbone(EncoderConfig(encoder_args=args), (16, 16))
    return ImageEncoder(Normalize((0.5,) * 3, (0.5,) * 3), backbone, "native").eval()


def images(seed, samples=60, classes=3):
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(samples) % classes
    image = torch.randint(0, 120, (samples, 3, 16, 16), generator=generator)
    image += (label * 60)[:, None, None, None]
    return image.to(torch.uint8), label


def measured(vit, test_label=None, **settings):
    (train, label), (test, own) = images(0), images(1)
    streams = {
        "train": ListStream(train, label),
        "val": ListStream(test, own if test_label is None else test_label),
    }
    return numbers(Transferability(Config(**settings)), context({"image": vit}, streams))


def test_blocks_are_read_in_order_and_separable_classes_are_found(vit, lone_group):
    found = measured(vit, depths=2)
    assert {"top1_blocks.1", "top1_blocks.3", "logme_blocks.1", "logme_blocks.3"} <= {
        name.removeprefix("transferability/") for name in found
    }
    assert found["transferability/top1_blocks.3"].value > 0.9
    assert found["transferability/best_depth"].value in (0.5, 1.0)
    assert -math.log(3) < found["transferability/nleep"].value <= 0
    image, _ = images(0)
    with torch.no_grad():
        x = vit.backbone.patch_embed(vit.normalize(image))
        x = vit.backbone.norm_pre(vit.backbone.patch_drop(vit.backbone._pos_embed(x)))
        for block in vit.backbone.blocks[:2]:
            x = block(x)
        torch.testing.assert_close(AtBlock(vit, "blocks.1")(image), x[:, 1:].mean(dim=1))


def test_labels_of_the_test_stream_choose_nothing(vit, lone_group):
    """All of them changed: everything but the accuracies on that stream stays as it is."""
    right, wrong = measured(vit), measured(vit, (images(1)[1] + 1) % 3)
    for name in right:
        same = right[name].value == wrong[name].value
        assert same != name.startswith("transferability/top1"), name


def test_too_little_is_refused(vit, lone_group):
    image, label = images(0, samples=12)
    streams = {"train": ListStream(image, label), "val": ListStream(image, label)}
    with pytest.raises(DataError, match="a probe needs two classes and 20 samples"):
        numbers(Transferability(Config()), context({"image": vit}, streams))
