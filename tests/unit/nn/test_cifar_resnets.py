"""Residual networks of CIFAR against a transcription by functions alone, their sizes as published, timm's interface."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn import functional as F

from pipeline.core.errors import ConfigError
from pipeline.nn.encoder import EncoderConfig, backbone_layers, create_backbone

# Millions of parameters with ten classes: He et al. 2016, table 6, whose shortcuts have none (its option A);
# Zagoruyko and Komodakis 2016, table 4.
PUBLISHED = {"resnet20": 0.27, "resnet32": 0.46, "resnet56": 0.85, "resnet110": 1.7, "wrn_40_1": 0.6, "wrn_40_2": 2.2}


def shaken(name, **more):
    """A model whose norms do something."""
    model = timm.create_model(name, **more).double().eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if "bn" in key or "downsample.1" in key:
                value.copy_(torch.rand_like(value.double()) + 0.5)
    return model


def transcription(state, x, blocks, wide):
    """Logits. He et al., section 3.3 and 4.2; Zagoruyko and Komodakis, figure 1 (a) and table 1."""

    def norm(x, name):
        shift = [state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *shift)

    def conv(x, name, stride=1):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    x = conv(x, "conv1")
    if not wide:
        x = norm(x, "bn1").relu()
    for stage in (1, 2, 3):
        for number in range(blocks):
            stride = 2 if stage > 1 and number == 0 else 1
            at = f"block{stage}.layer.{number}" if wide else f"layer{stage}.{number}"
            if wide:
                y = norm(x, f"{at}.bn1").relu()
                changes = f"{at}.convShortcut.weight" in state
                short = conv(y, f"{at}.convShortcut", stride) if changes else x
                x = short + conv(norm(conv(y, f"{at}.conv1", stride), f"{at}.bn2").relu(), f"{at}.conv2")
                continue
            y = norm(conv(norm(conv(x, f"{at}.conv1", stride), f"{at}.bn1").relu(), f"{at}.conv2"), f"{at}.bn2")
            if f"{at}.downsample.0.weight" in state:
                x = norm(conv(x, f"{at}.downsample.0", stride), f"{at}.downsample.1")
            x = (x + y).relu()
    if wide:
        x = norm(x, "bn1").relu()
    return F.linear(F.avg_pool2d(x, 8).flatten(1), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize(
    ("name", "blocks", "wide"), [("resnet8x4", 1, False), ("resnet20", 3, False), ("wrn_16_2", 2, True)]
)
def test_forward_is_that_of_the_papers(name, blocks, wide):
    torch.manual_seed(0)
    model, x = shaken(name, num_classes=7), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(model(x), transcription(model.state_dict(), x, blocks, wide), rtol=1e-9)
        features = model.forward_features(x)
        assert features.shape[2:] == (8, 8) and torch.equal(model.forward_head(features), model(x))
        assert torch.equal(model.forward_head(features, pre_logits=True), features.mean((2, 3)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    count = sum(p.numel() for key, p in model.named_parameters() if "downsample" not in key)
    assert f"{count / 1e6:.{len(str(PUBLISHED[name]).partition('.')[2])}f}" == str(PUBLISHED[name])


@pytest.mark.parametrize(("name", "last"), [("resnet8x4", "layer3.0."), ("wrn_16_2", "block3.layer.1.")])
def test_layers_go_from_the_stem_to_the_last_block(name, last):
    """Every parameter has one layer; a norm behind all blocks belongs to the last."""
    backbone = create_backbone(EncoderConfig(encoder=name), (32, 32))
    layers = backbone_layers(backbone, "")
    assert sorted(sum(layers, ())) == sorted(n for n, _ in backbone.named_parameters())
    assert layers[0][0] == "conv1.weight" and ("bn1.weight" in layers[0]) == name.startswith("resnet")
    assert all(n.startswith((last, "bn1.")) for n in layers[-1])
    with pytest.raises(ConfigError, match="gradient checkpointing is not supported"):
        create_backbone(EncoderConfig(encoder=name, checkpointing=True), (32, 32))


def test_weights_of_published_files_fill_a_teacher(tmp_path):
    """RepDistiller's files hold {"model": state}, under the names of its code."""
    from pipeline.nn.teacher import Teacher, TeacherConfig

    torch.manual_seed(0)
    theirs = shaken("wrn_16_2", num_classes=5).float()
    torch.save({"epoch": 240, "model": theirs.state_dict()}, tmp_path / "ckpt_epoch_240.pth")
    path = str(tmp_path / "ckpt_epoch_240.pth")
    config = TeacherConfig(weights=path, encoder="wrn_16_2", mean=(0.0,) * 3, std=(1.0,) * 3)
    teacher, pixels = Teacher(config, (32, 32), 5), torch.rand(2, 3, 32, 32)
    teacher.fill(path, ())
    with torch.no_grad():
        seen = teacher(pixels, blocks=("block2", "block3.layer.1"))
        assert torch.allclose(seen.logits, theirs(pixels), atol=1e-5)
    assert seen.blocks["block2"].shape == (2, 64, 16, 16) and seen.blocks["block3.layer.1"].shape == (2, 128, 8, 8)
