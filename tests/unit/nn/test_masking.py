import pytest
import timm
import torch

from pipeline.core.errors import ConfigError
from pipeline.core.random import SampleRandom
from pipeline.nn.masking import encode_visible, make_maskable, random_masks


def encoder(name, **args):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=0, global_pool="", **args).eval()


TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": (32, 48), "patch_size": 16}
NAFLEX = {key: value for key, value in TINY.items() if key != "img_size"}
# a plain one, one without class token, rotary with registers, rotary per layer, NaFlex
ENCODERS = [
    ("vit_tiny_patch16_224", TINY),
    ("vit_small_patch16_224.augreg_in1k", TINY | {"class_token": False}),
    ("vit_small_patch16_dinov3", TINY),
    ("vit_small_patch16_rope_mixed_224", TINY),
    ("naflexvit_base_patch16_gap", NAFLEX | {"fc_norm": False}),
]


@pytest.mark.parametrize(("name", "args"), ENCODERS)
def test_keeping_all_patches_in_any_order_is_the_plain_model(name, args):
    model = encoder(name, **args)
    x = torch.randn(2, 3, 32, 48)
    plain = model(x)
    geometry = make_maskable(model, (32, 48))
    assert geometry.patch == (16, 16) and geometry.grid == (2, 3) and geometry.patches == 6
    torch.testing.assert_close(model(x), plain)
    torch.testing.assert_close(model.train()(x), plain)
    order = torch.stack([torch.arange(6), torch.tensor([5, 3, 1, 0, 2, 4])])
    prefix = model.num_prefix_tokens
    tokens = encode_visible(model.eval(), x, order)
    torch.testing.assert_close(tokens[:, :prefix], plain[:, :prefix], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokens[1, prefix:], plain[1, prefix:][order[1]], rtol=1e-4, atol=1e-5)
    assert not model.training and torch.equal(model(x), plain)


@pytest.mark.parametrize(("name", "args"), ENCODERS)
def test_hidden_patches_have_no_influence_and_visible_ones_have(name, args):
    model = encoder(name, **args)
    make_maskable(model, (32, 48))
    x = torch.randn(1, 3, 32, 48)
    keep = torch.tensor([[4, 0]])
    tokens = encode_visible(model, x, keep)
    assert tokens.shape == (1, model.num_prefix_tokens + 2, 16)
    hidden, seen = x.clone(), x.clone()
    hidden[..., :16, 16:] += 1  # patches 1 and 2
    seen[..., 16:, 16:32] += 1  # patch 4
    assert torch.equal(encode_visible(model, hidden, keep), tokens)
    assert not torch.allclose(encode_visible(model, seen, keep), tokens)


@pytest.mark.parametrize(
    ("name", "args", "reason"),
    [
        ("beit_base_patch16_224", {"depth": 1, "embed_dim": 16, "num_heads": 2}, "no place"),
        ("resnet18", {}, "no place"),
        ("vit_tiny_r_s16_p8_224", {"depth": 1}, "stem"),
    ],
)
def test_what_cannot_be_masked_is_refused_with_the_reason(name, args, reason):
    with pytest.raises(ConfigError, match=reason):
        make_maskable(encoder(name, **args), (224, 224))


def test_a_size_that_patches_do_not_fill_is_refused():
    with pytest.raises(ConfigError, match="30x32 is not a multiple of the patch 16x16"):
        make_maskable(encoder("vit_tiny_patch16_224", **TINY | {"img_size": 32}), (30, 32))


def test_masks_are_permutations_that_belong_to_the_sample():
    ids, epoch = torch.arange(40), torch.zeros(40, dtype=torch.int64)
    keep, hidden = random_masks(SampleRandom(0, "mae.mask", epoch, ids), 16, 4)
    assert keep.shape == (40, 4) and hidden.shape == (40, 12)
    assert torch.equal(torch.cat([keep, hidden], dim=1).sort(dim=1).values, torch.arange(16).expand(40, -1))
    again, _ = random_masks(SampleRandom(0, "mae.mask", epoch[7:9], ids[7:9]), 16, 4)
    assert torch.equal(again, keep[7:9])
    assert len({tuple(row.tolist()) for row in keep}) > 35
