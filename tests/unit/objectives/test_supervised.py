import copy
import math

import pytest
import torch
from pydantic import ValidationError

from pipeline.core.errors import ConfigError, DataError
from pipeline.core.protocols import Clock, DataFacts, StepContext
from pipeline.nn.encoder import EncoderConfig, create_backbone
from pipeline.nn.mixing import mix
from pipeline.nn.weights import save
from pipeline.objectives.supervised import Config, Supervised

CTX = StepContext(seed=1, clock=Clock(0, 0, 100))
VIT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def build(classes=6, encoder="vit_tiny_patch16_224", encoder_args=VIT, **settings):
    torch.manual_seed(0)
    names = tuple(f"c{i}" for i in range(classes))
    return Supervised(Config(encoder=encoder, encoder_args=encoder_args, **settings), DataFacts((32, 32), names))


def batch(label):
    image = torch.randint(0, 256, (len(label), 3, 32, 32), dtype=torch.uint8)
    ids = torch.arange(len(label))
    return {"image": image, "label": torch.tensor(label), "id": ids, "epoch": torch.zeros_like(ids)}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_hits_from_the_logits_by_hand(smoothing):
    model = build(label_smoothing=smoothing)
    rows = [[2.0, 1.0, 0.0, -1.0, -2.0, -3.0], [0.0, 3.0, 1.0, -1.0, 0.5, 2.0], [0.1, 0.2, 0.3, 0.4, 0.5, 0.0]]
    label = [0, 3, 1]  # first, last of six, fourth
    model.classify = lambda features: torch.tensor(rows)
    out = model(batch(label), CTX)
    expected = 0.0
    for row, truth in zip(rows, label, strict=True):
        log_sum = math.log(sum(math.exp(v) for v in row))
        target = [smoothing / 6 + (1 - smoothing) * (i == truth) for i in range(6)]
        expected += sum(t * (log_sum - v) for t, v in zip(target, row, strict=True)) / 3
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)
    assert out.metrics["top1"].item() == pytest.approx(1 / 3) and out.metrics["top5"].item() == pytest.approx(2 / 3)


def test_few_classes_have_no_top5():
    assert list(build(classes=4)(batch([0, 3]), CTX).metrics) == ["top1"]


@pytest.mark.parametrize("label", [[0, 6], [-1, 2]])
def test_labels_outside_the_classes_are_named_before_they_reach_the_loss(label):
    with pytest.raises(DataError, match=rf"labels run from {min(label)} to {max(label)}.*6 classes"):
        build()(batch(label), CTX)


def test_no_classes_is_a_config_error():
    with pytest.raises(ConfigError, match="at least two classes"):
        build(classes=0)


@pytest.mark.parametrize(
    ("encoder", "args"), [("resnet10t", {}), ("vit_tiny_patch16_224", VIT | {"global_pool": "avg"})]
)
def test_any_backbone_learns(encoder, args):
    model = build(encoder=encoder, encoder_args=args).train()
    data = batch([0, 1, 2, 3])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(data, CTX).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert model.encoders()["image"].eval()(data["image"]).shape == (4, model.encoders()["image"].dim)


def test_drop_path_applies_with_rates_that_grow_with_depth_and_belongs_to_the_sample():
    depth, samples = 4, 300
    model = build(encoder_args=VIT | {"depth": depth, "drop_path_rate": 0.6}).train()
    data = batch([0, 1, 2, 3, 4, 5] * (samples // 6))
    seen = []
    for block in model.encoder.backbone.blocks:
        for path in (block.drop_path1, block.drop_path2):
            path.register_forward_hook(lambda module, given, out: seen.append((*given, out)))
    loss = model(data, CTX).loss
    assert len(seen) == 2 * depth
    fates = []
    for index, (given, out) in enumerate(seen):
        rate = 0.6 * (index // 2) / (depth - 1)
        kept = out.flatten(1).any(dim=1)
        expected = given / (1 - rate) * kept[:, None, None]
        torch.testing.assert_close(out, expected)
        assert abs(1 - kept.float().mean() - rate) <= 5 * (rate * (1 - rate) / samples) ** 0.5
        fates.append(kept)
    assert len({tuple(kept.tolist()) for kept in fates if not kept.all()}) == 2 * (depth - 1)
    assert model(data, CTX).loss == loss != model(data | {"epoch": data["epoch"] + 1}, CTX).loss
    seen.clear()
    model({field: value[100:150] for field, value in data.items()}, CTX)
    for kept, (given, out) in zip(fates, seen, strict=True):
        assert torch.equal(out.flatten(1).any(dim=1), kept[100:150]) and len(given) == 50
    model.eval()
    assert model(data, CTX).loss == model(data | {"epoch": data["epoch"] + 1}, CTX).loss


def test_positions_and_class_token_are_not_decayed():
    assert build().no_weight_decay() == {"encoder.backbone.cls_token", "encoder.backbone.pos_embed"}


def test_the_showcase_names_truth_and_mistakes():
    model = build()
    model.classify = lambda features: torch.eye(6)[[0, 2]]
    caption = model.showcase(batch([0, 1]), CTX)["predictions"].caption
    assert caption.endswith("c0, c1 (taken for c2)")


def test_the_loss_of_mixed_samples_is_that_of_soft_labels():
    model = build(mixing={"mixup": 0.8, "cutmix": 1.0}, label_smoothing=0.1).train()
    data = batch([0, 1, 2, 3, 4, 5])
    out = model(data, CTX)
    x, partner, part = mix(
        model.encoder.normalize(data["image"]), CTX.random(data, "supervised.mix"), model.config.mixing
    )
    soft = part[:, None] * torch.eye(6)[data["label"]] + (1 - part[:, None]) * torch.eye(6)[data["label"][partner]]
    soft = 0.9 * soft + 0.1 / 6
    logits = model.head(model.encoder.backbone(x))
    torch.testing.assert_close(out.loss, -(soft * logits.log_softmax(1)).sum(1).mean())


def test_augmentation_changes_what_is_seen_and_belongs_to_the_sample():
    model, data = build(augment={"probability": 1.0}).train(), batch([0, 1, 2, 3])
    seen = []
    model.encoder.normalize.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(data, CTX)
    model({field: value[2:] for field, value in data.items()}, CTX)
    assert not torch.equal(seen[0], data["image"])
    assert (seen[0][2:].int() - seen[1].int()).abs().max() <= 1


def probe(tmp_path, **settings):
    """A frozen encoder, and what its weights were before."""
    args = VIT | {"drop_path_rate": 0.5}
    save(tmp_path / "w.safetensors", create_backbone(EncoderConfig(encoder_args=args), (32, 32)).state_dict(), {})
    encoder = "vit_base_patch16_224"
    model = build(encoder=encoder, encoder_args=args, weights=str(tmp_path / "w.safetensors"), freeze=True, **settings)
    return model.train(), copy.deepcopy(model.encoder.state_dict())


def test_a_frozen_encoder_gives_a_linear_classifier_on_standardised_class_tokens(tmp_path):
    model, before = probe(tmp_path)
    data = batch([0, 1, 2, 3, 4, 5])
    out = model(data, CTX)
    out.loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["head.weight", "head.bias"]
    token = model.encoder.backbone.forward_features(model.encoder.normalize(data["image"]))[:, 0].detach()
    standard = (token - token.mean(0)) / (token.var(0, unbiased=False) + 1e-6).sqrt()
    expected = torch.nn.functional.cross_entropy(standard @ model.head.weight.T + model.head.bias, data["label"])
    torch.testing.assert_close(out.loss, expected)
    after = model.encoder.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    # after training, statistics of the batches that were seen
    running = (token - 0.1 * token.mean(0)) / (0.9 + 0.1 * token.var(0) + 1e-6).sqrt()
    logits = model.eval().encoders()["logits"](data["image"])
    torch.testing.assert_close(logits, running @ model.head.weight.T + model.head.bias)


def test_a_probe_of_random_features_by_mistake_is_refused():
    with pytest.raises(ValidationError, match="random features; set weights"):
        build(freeze=True)


def test_augmentation_of_other_than_three_channels_is_refused():
    with pytest.raises(ValidationError, match="three channels, not 1"):
        Config(augment={}, mean=(0.5,), std=(0.5,))
