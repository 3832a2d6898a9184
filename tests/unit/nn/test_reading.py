"""What is read off encoders, held against timm's own way of giving intermediate outputs, and DINOv2's formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.core.errors import ConfigError
from pipeline.core.evaluation import OWN, Reading
from pipeline.nn.encoder import EncoderConfig, ImageEncoder, create_backbone
from pipeline.nn.images import Normalize
from pipeline.nn.reading import patches, read

VIT = EncoderConfig(encoder="vit_tiny_patch16_224", encoder_args={"depth": 3, "embed_dim": 24, "num_heads": 2})
NAFLEX = EncoderConfig(encoder="naflexvit_base_patch16_gap", encoder_args={"depth": 3, "embed_dim": 24, "num_heads": 2})
RESNET = EncoderConfig(encoder="resnet18", encoder_args={"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]})
IMAGE = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8, generator=torch.manual_seed(1))


class Projected(nn.Module):
    """An encoder inside of another, as CLIP's image tower is."""

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.encoder, self.projection = encoder, nn.Linear(encoder.dim, 5)

    def forward(self, image):
        return self.projection(self.encoder(image))


def encoder(config: EncoderConfig, pool="native") -> ImageEncoder:
    torch.manual_seed(0)
    args = {} if pool == "native" else {"global_pool": ""}
    backbone = create_backbone(config, (32, 48), **args)
    for module in backbone.modules():  # so that the norm is seen
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return ImageEncoder(Normalize(config.mean, config.std), backbone, pool).eval()


def oracle(model: ImageEncoder, count: int):
    """timm's (patches, class token) of the last blocks, normalised."""
    x = model.normalize(IMAGE)
    return model.backbone.forward_intermediates(
        x, indices=count, norm=True, return_prefix_tokens=True, intermediates_only=True, output_fmt="NLC"
    )


@torch.no_grad()
@pytest.mark.parametrize("wrap", [lambda e: e, Projected], ids=["bare", "projected"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_transformer_is_read_as_by_dinov2(count, wrap):
    model = encoder(VIT, "cls")
    whole = wrap(model)
    found = read(whole, IMAGE, [Reading(count, "cls"), OWN, Reading(count, "cls+mean"), Reading(1, "mean")])
    expected = oracle(model, count)
    cls = torch.cat([prefix[:, 0] for _, prefix in expected], dim=1)
    mean = expected[-1][0].mean(dim=1)
    torch.testing.assert_close(found[Reading(count, "cls")], cls)
    torch.testing.assert_close(found[Reading(count, "cls+mean")], torch.cat([cls, mean], dim=1))
    torch.testing.assert_close(found[Reading(1, "mean")], mean)
    assert torch.equal(found[OWN], whole(IMAGE))
    assert list(found) == [Reading(count, "cls"), OWN, Reading(count, "cls+mean"), Reading(1, "mean")]


@torch.no_grad()
@pytest.mark.parametrize("config", [VIT, NAFLEX], ids=["vit", "naflex"])
def test_patches_lie_where_they_were_cut(config):
    model = encoder(config, "mean")
    (tokens, _prefix), *_ = oracle(model, 1) if config is VIT else [(_tokens(model), None)]
    found = patches(model, IMAGE)
    assert found.shape == (2, 24, 2, 3)
    for row in range(2):
        for column in range(3):
            torch.testing.assert_close(found[:, :, row, column], tokens[:, 3 * row + column])


def _tokens(model: ImageEncoder) -> torch.Tensor:
    return model.backbone.forward_features(model.normalize(IMAGE))[:, model.backbone.num_prefix_tokens :]


@torch.no_grad()
def test_a_convolutional_encoder_is_read_by_its_stages():
    model = encoder(RESNET)
    found = read(model, IMAGE, [Reading(1, "mean"), OWN])
    last = model.backbone.forward_features(model.normalize(IMAGE))
    torch.testing.assert_close(found[Reading(1, "mean")], last.mean(dim=(2, 3)))
    torch.testing.assert_close(patches(model, IMAGE), last)
    with pytest.raises(ConfigError, match='no class token; read it with pool = "mean"'):
        read(model, IMAGE, [Reading(1, "cls")])


def test_what_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="4 blocks are to be read, and the encoder has 3"):
        read(encoder(VIT), IMAGE, [Reading(4, "mean")])
    with pytest.raises(ConfigError, match="no backbone of timm"):
        read(nn.Flatten(), IMAGE, [Reading(1, "mean")])


def test_nothing_stays_behind():
    model = encoder(VIT)
    with pytest.raises(ConfigError):
        read(model, IMAGE, [Reading(1, "mean"), Reading(9, "mean")])
    read(model, IMAGE, [Reading(1, "mean")])
    assert not any(module._forward_hooks for module in model.modules())
