from typing import Any

import pytest
import timm
import torch
from pydantic import ValidationError
from timm.optim import param_groups_layer_decay

from pipeline.core.errors import ConfigError
from pipeline.nn.encoder import EncoderConfig, ImageEncoder, backbone_layers, create_backbone
from pipeline.nn.images import Normalize

VIT = {"encoder": "vit_tiny_patch16_224", "encoder_args": {"depth": 2, "embed_dim": 16, "num_heads": 2}}


def build(size=(32, 48), **settings):
    torch.manual_seed(0)
    config = EncoderConfig(**settings)
    return config, create_backbone(config, size)


@pytest.mark.parametrize(
    ("settings", "pool", "dim"),
    [
        (VIT, "cls", 16),
        (VIT, "mean", 16),
        (VIT, "native", 16),
        ({"encoder": "resnet10t"}, "native", 512),
        ({"encoder": "mobilenetv3_small_050"}, "native", 1024),
        (VIT | {"mean": (0.5,) * 5, "std": (0.2,) * 5}, "native", 16),
    ],
)
def test_one_vector_per_image_of_any_size_and_channels(settings, pool, dim):
    config = EncoderConfig(**settings)
    fixed = {} if pool == "native" else {"global_pool": ""}
    backbone = create_backbone(config, (32, 48), **fixed)
    encoder = ImageEncoder(Normalize(config.mean, config.std), backbone, pool).eval()
    image = torch.randint(0, 256, (2, len(config.mean), 32, 48), dtype=torch.uint8)
    assert encoder(image).shape == (2, dim) and encoder.dim == dim


def test_pooling_takes_the_tokens_it_says():
    config = EncoderConfig(**VIT)
    backbone = create_backbone(config, (32, 48), global_pool="").eval()
    normalize = Normalize(config.mean, config.std)
    image = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    tokens = backbone((image / 255 - normalize.mean) / normalize.std)
    torch.testing.assert_close(ImageEncoder(normalize, backbone, "cls")(image), tokens[:, 0])
    torch.testing.assert_close(ImageEncoder(normalize, backbone, "mean")(image), tokens[:, 1:].mean(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "vit_tinny_patch16_224"}, "did you mean 'vit_tiny_patch16_224'"),
        ({"encoder": "vit_tiny_patch16_224", "encoder_args": {"dpeth": 2}}, "dpeth"),
        ({"encoder": "vit_tiny_patch16_224", "encoder_args": {"img_size": 64}}, "img_size cannot be set here"),
        ({"encoder": "vit_tiny_patch16_224", "encoder_args": {"num_heads": 5}}, "cannot build 'vit_tiny_patch16_224'"),
    ],
)
def test_mistakes_are_config_errors(settings, message):
    with pytest.raises(ConfigError, match=message):
        build(**settings)


def test_mean_and_std_must_fit():
    with pytest.raises(ValidationError, match="give one of each"):
        EncoderConfig(mean=(0.5,), std=(0.2, 0.2))
    with pytest.raises(ValidationError, match="must be positive"):
        EncoderConfig(mean=(0.5,), std=(0.0,))


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_layers_give_the_scales_of_timm(pool):
    name, args = "vit_tiny_patch16_224", {"depth": 3, "embed_dim": 16, "num_heads": 2, "global_pool": pool}
    whole = timm.create_model(name, num_classes=10, **args)
    names = {id(p): n for n, p in whole.named_parameters()}
    scale = {
        names[id(p)]: group["lr_scale"]
        for group in param_groups_layer_decay(whole, layer_decay=0.5)
        for p in group["params"]
    }
    backbone = timm.create_model(name, num_classes=0, **args)
    layers = backbone_layers(backbone, "x.")
    for depth, layer in enumerate(layers):
        for parameter in layer:
            assert scale.pop(parameter.removeprefix("x.")) == 0.5 ** (len(layers) - depth)
    expected = {"head.weight", "head.bias"} | ({"fc_norm.weight", "fc_norm.bias"} if pool == "avg" else set())
    assert set(scale) == expected and set(scale.values()) == {1.0}


TINY = {"depth": 1, "embed_dim": 16, "num_heads": 2}
STEMS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": TINY | {"patch_size": 12},
    "eva02_tiny_patch14_224": TINY | {"patch_size": 12},
    "mixer_s16_224": {},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)},
    "poolformer_s12": {},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1), "num_heads": (1, 1), "embed_dim": 8},
    "resnet10t": {"channels": (8, 8, 8, 8)},
    "mobilenetv3_small_050": {},
}


def unseen(backbone, size):
    """Rows and columns at the lower and right edge on which the features do not depend, by the gradient."""
    image = torch.randn(4, 3, *size, requires_grad=True)
    backbone.eval()(image).square().sum().backward()
    seen = image.grad.abs().sum((0, 1)) > 0
    return tuple(length - 1 - int(seen.any(axis).nonzero().max()) for length, axis in zip(size, (1, 0), strict=True))


@pytest.mark.parametrize("name", STEMS)
@pytest.mark.parametrize("size", [(50, 64), (48, 60), (47, 40)])
def test_images_whose_edges_would_never_be_seen_are_refused_with_sizes_that_fit(name, size, monkeypatch):
    settings = {"encoder": name, "encoder_args": STEMS[name]}
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.nn.encoder._refuse_unseen_edges", lambda *_: None)
        lost = unseen(build(size, **settings)[1], size)
    if lost == (0, 0):
        assert build(size, **settings)
        return
    with pytest.raises(
        ConfigError, match=rf"size: {size[0]}x{size[1]} .* the last {lost[0]} rows and {lost[1]} col"
    ) as e:
        build(size, **settings)
    fitting = [tuple(map(int, fit.split("x"))) for fit in str(e.value).rpartition(": ")[2].split(" or ")]
    assert len(fitting) == 2
    for fit in fitting:
        assert all(abs(a - b) < 16 and (a == b or edge) for a, b, edge in zip(fit, size, lost, strict=True))
        assert unseen(build(fit, **settings)[1], fit) == (0, 0)


def test_a_patch_larger_than_the_image_names_the_one_size_that_fits():
    with pytest.raises(ConfigError, match=r"Sizes that fit: 16x32$"):
        build((10, 32), encoder="vit_tiny_patch16_224", encoder_args=TINY)


def test_a_backbone_that_pads_takes_any_size():
    args = TINY | {"patch_size": 12, "dynamic_img_size": True, "dynamic_img_pad": True}
    assert unseen(build((50, 64), encoder="vit_tiny_patch16_224", encoder_args=args)[1], (50, 64)) == (0, 0)


def test_naflex_takes_whole_patches_alone():
    """It would end in a traceback of a reshape."""
    args = TINY | {"patch_size": 12}
    with pytest.raises(ConfigError, match=r"the last 2 rows and 4 columns.*: 48x60 or 60x72$"):
        build((50, 64), encoder="naflexvit_base_patch16_gap", encoder_args=args)
    assert build((48, 60), encoder="naflexvit_base_patch16_gap", encoder_args=args)
