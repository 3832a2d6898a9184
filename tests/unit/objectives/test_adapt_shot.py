"""SHOT: centroids and losses against a transcription of the authors' steps in numpy."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.spatial.distance import cdist
from scipy.special import log_softmax, softmax
from torch.nn import functional

from pipeline.core.errors import ConfigError, DataError
from pipeline.core.protocols import Clock, DataFacts, Embeddings, StepContext
from pipeline.nn.adaptation.centroids import centroid_labels
from pipeline.objectives.adapt_shot import AdaptShot, Config

CTX = StepContext(seed=1, clock=Clock(0, 0, 100))
VIT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def build(samples=20, classes=5, **settings):
    torch.manual_seed(0)
    config = Config(encoder="vit_tiny_patch16_224", encoder_args=VIT, head_std=0.5, **settings)
    return AdaptShot(config, DataFacts((32, 32), tuple(f"c{i}" for i in range(classes)), samples=samples))


def batch(count=8, first=0):
    generator = torch.Generator().manual_seed(3)
    ids = torch.arange(first, first + count)
    image = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return {"image": image, "id": ids, "epoch": torch.zeros_like(ids)}


def clouds(seed=0, n=90, d=7, k=5, spread=1.5):
    """Features around centres, and answers that are often wrong."""
    rng = np.random.default_rng(seed)
    centres, label = rng.normal(size=(k, d)) * 3, rng.integers(0, k, n)
    features = centres[label] + spread * rng.normal(size=(n, d))
    logits = rng.normal(size=(n, k)) * 2
    logits[np.arange(n), label] += 1.5
    return features, logits


def labels_by_hand(features, logits, threshold=0):
    """Line by line what section 3.3 and the code of the paper say."""
    rows = np.hstack([features, np.ones((len(features), 1))])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    weights, predict, k = softmax(logits, axis=1), logits.argmax(axis=1), logits.shape[1]
    for _ in range(2):
        centroids = weights.T @ rows / (1e-8 + weights.sum(axis=0)[:, None])
        present = np.where(np.bincount(predict, minlength=k) > threshold)[0]
        predict = present[cdist(rows, centroids[present], "cosine").argmin(axis=1)]
        weights = np.eye(k)[predict]
    return predict


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threshold", [0, 15])
def test_labels_are_those_of_the_paper(seed, threshold):
    features, logits = clouds(seed)
    found = centroid_labels(torch.from_numpy(features), torch.from_numpy(logits), threshold)
    expected = labels_by_hand(features, logits, threshold)
    assert np.array_equal(found.numpy(), expected)
    assert not np.array_equal(expected, logits.argmax(axis=1))


def test_a_class_that_nothing_is_taken_for_gets_no_label():
    features, logits = clouds(1)
    logits[:, 2] = -50.0
    assert 2 not in centroid_labels(torch.from_numpy(features), torch.from_numpy(logits)).tolist()


def test_where_no_class_is_answered_often_enough_the_message_says_what_to_set():
    features, logits = clouds(1, n=20)
    with pytest.raises(DataError, match=r"more than 30 of 20 samples; lower objective\.least_samples"):
        centroid_labels(torch.from_numpy(features), torch.from_numpy(logits), 30)


@pytest.mark.parametrize("spread", [True, False])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_loss_by_hand(spread, weight):
    model = build(diversity=spread, pseudo_labels=weight)
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)) * 2
    pseudo = torch.tensor([0, 4, 2, -1, 1, 1])
    out = model.loss(Embeddings({"logits": logits, "pseudo": pseudo, "features": logits}, {}), CTX)
    p, log = softmax(logits.numpy(), axis=1), log_softmax(logits.numpy(), axis=1)
    mean = p.mean(axis=0)
    expected = -(p * log).sum(axis=1).mean()
    if spread:
        expected += (mean * np.log(mean)).sum()
    # A sample that no survey has seen has no pseudo-label, and adds nothing.
    expected -= weight * sum(log[i, j] for i, j in enumerate(pseudo.tolist()) if j >= 0) / 6
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)
    assert ("cross_entropy" in out.metrics) == bool(weight)


def test_the_survey_labels_by_id_and_training_reads_them_so(lone_group):
    model = build()
    rows = model.eval().look("centroids", batch(20), CTX)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(5))
    model.surveyed("centroids", {name: value[order] for name, value in rows.items()} | {"id": order}, CTX)
    expected = labels_by_hand(rows["features"].detach().numpy(), rows["logits"].detach().numpy())
    assert model.pseudo.tolist() == expected.tolist()
    assert model.embed(batch(6, first=9), CTX)["pseudo"].tolist() == expected[9:15].tolist()


def test_the_classifier_is_not_trained_and_the_rest_is():
    model = build(bottleneck=6, weight_norm=True).train()
    model(batch(), CTX).loss.backward()
    trained = {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {"encoder", "norm"}


def test_without_pseudo_labels_there_is_no_survey():
    assert not build(pseudo_labels=0.0).surveys() and build().surveys()


def test_weight_norm_begins_as_the_plain_layer_and_separates_length_from_direction():
    torch.manual_seed(0)
    head = build(weight_norm=True).head
    x = torch.randn(3, head.in_features)
    torch.testing.assert_close(head(x), functional.linear(x, head.weight, head.bias))
    with torch.no_grad():
        head.weight.mul_(7.0)
        before = head(x)
        head.weight.div_(7.0)
    torch.testing.assert_close(before, head(x))


def test_a_data_set_without_classes_is_refused():
    with pytest.raises(ConfigError, match=r"'adapt_shot'.*at least two classes"):
        build(classes=1)
    with pytest.raises(ValidationError):
        Config(pseudo_labels=-1)
