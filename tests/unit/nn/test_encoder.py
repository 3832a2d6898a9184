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
