"""Exemplar: images are their own classes."""

from typing import Any

import pytest
import torch

from pipeline.core.errors import ConfigError, DataError
from pipeline.core.protocols import Batch, Clock, DataFacts, StepContext
from pipeline.objectives.exemplar import Config, Exemplar

CTX = StepContext(seed=1, clock=Clock(0, 0, 100))
VIT = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


def build(samples: int = 12, **settings: Any) -> Exemplar:
    torch.manual_seed(0)
    config = Config(**{"encoder": "vit_tiny_patch16_224", "encoder_args": VIT} | settings)
    return Exemplar(config, DataFacts((32, 32), (), samples=samples))


def batch(*ids: int) -> Batch:
    image = torch.randint(0, 256, (len(ids), 3, 32, 32), dtype=torch.uint8, generator=torch.manual_seed(5))
    return {"image": image, "id": torch.tensor(ids), "epoch": torch.zeros(len(ids), dtype=torch.int64)}


def test_the_class_of_an_image_is_its_number():
    model, data = build(), batch(3, 11, 0)
    out = model(data, CTX)
    with torch.no_grad():
        features = model.encoder(model.distorted(data, CTX))
        logits = model.head(features).double()
    torch.testing.assert_close(out.features, features)
    expected = [float(row.logsumexp(0) - row[own]) for row, own in zip(logits, (3, 11, 0), strict=True)]
    assert out.losses is not None and out.losses.tolist() == pytest.approx(expected, rel=1e-5)
    assert logits.shape[1] == 12
    hits = sum(int(row.argmax()) == own for row, own in zip(logits, (3, 11, 0), strict=True))
    assert float(out.metrics["top1"]) == pytest.approx(hits / 3)


def test_copies_differ_from_epoch_to_epoch_and_belong_to_the_sample():
    model, data = build(), batch(3, 11)
    later = data | {"epoch": data["epoch"] + 1}
    assert not torch.equal(model.distorted(data, CTX), model.distorted(later, CTX))
    alone = {name: value[1:] for name, value in data.items()}
    torch.testing.assert_close(model.distorted(alone, CTX)[0], model.distorted(data, CTX)[1])
    plain = build(colour={"jitter": 0, "grey": 0, "blur": 0}).distorted(data, CTX)
    torch.testing.assert_close(plain, data["image"].float() / 255)


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ConfigError, match="class of each image, and the data set has 0"):
        build(samples=0)
    with pytest.raises(ConfigError, match="3 channels, not 1"):
        build(mean=[0.5], std=[0.5])
    with pytest.raises(DataError, match="number 12, but the data set was counted as 12 images"):
        build()(batch(3, 12), CTX)
