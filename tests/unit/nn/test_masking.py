import pytest
import timm
import torch

from pipeline.core.errors import ConfigError
from pipeline.core.random import SampleRandom
from pipeline.nn.masking import draw_masks, encode_visible, grid_cell, make_maskable


def encoder(name, **args):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, global_pool="", **args).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".attn." in key and parameter.ndim > 1:  # initial weights look at all positions alike
                parameter.copy_(torch.randn_like(parameter))
    return model


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


def numbers(ids, purpose="mae.mask"):
    return SampleRandom(0, purpose, torch.zeros_like(ids), ids)


@pytest.mark.parametrize("kind", ["random", "block", "grid"])
@pytest.mark.parametrize(("grid", "visible"), [((4, 4), 4), ((14, 14), 49), ((6, 10), 15), ((8, 2), 4)])
def test_masks_are_permutations_that_belong_to_the_sample(kind, grid, visible):
    ids, n = torch.arange(40), grid[0] * grid[1]
    keep, hidden = draw_masks(kind, numbers(ids), grid, visible)
    assert keep.shape == (40, visible) and hidden.shape == (40, n - visible)
    assert torch.equal(torch.cat([keep, hidden], dim=1).sort(dim=1).values, torch.arange(n).expand(40, -1))
    again, _ = draw_masks(kind, numbers(ids[7:9]), grid, visible)
    assert torch.equal(again, keep[7:9])
    assert len({tuple(sorted(row.tolist())) for row in keep}) > (3 if kind == "grid" else 15)


def picture(hidden, grid):
    mask = torch.zeros(len(hidden), grid[0] * grid[1], dtype=torch.bool)
    return mask.scatter(1, hidden, True).view(-1, *grid)


def test_random_masks_hide_every_patch_equally_often():
    _, hidden = draw_masks("random", numbers(torch.arange(4000)), (4, 4), 4)
    rate = picture(hidden, (4, 4)).float().mean(0)
    assert (rate - 0.75).abs().max() < 0.03  # standard error 0.007


@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.75])
def test_blocks_are_few_and_connected(ratio):
    """Neighbouring patches mostly share their fate, which for patches drawn one by one is half as frequent or less."""
    grid, n = (14, 14), 196
    visible = int(n * (1 - ratio))

    def borders(kind):
        _, hidden = draw_masks(kind, numbers(torch.arange(200)), grid, visible)
        mask = picture(hidden, grid)
        return ((mask[:, 1:] != mask[:, :-1]).sum() + (mask[:, :, 1:] != mask[:, :, :-1]).sum()).item() / 200

    assert borders("block") < 0.4 * borders("random")


def test_with_little_to_hide_one_rectangle_is_mostly_enough():
    """A block has at least 16/196 of the patches: here all of them, or, when rounding made it smaller, nearly all."""
    _, hidden = draw_masks("block", numbers(torch.arange(300)), (14, 14), 196 - 16)
    compact = 0
    for mask in picture(hidden, (14, 14)):
        rows, columns = mask.nonzero().unbind(1)
        compact += (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1) <= 20
    assert compact > 150


@pytest.mark.parametrize(("grid", "k"), [((14, 14), 2), ((6, 9), 3)])
def test_grids_show_one_patch_of_each_cell_at_one_place(grid, k):
    keep, _ = draw_masks("grid", numbers(torch.arange(50)), grid, grid[0] * grid[1] // k**2)
    row, column = keep // grid[1], keep % grid[1]
    assert (row % k == row[:, :1] % k).all() and (column % k == column[:, :1] % k).all()
    assert len({tuple(c) for c in torch.stack([row[:, 0] % k, column[:, 0] % k], 1).tolist()}) == k * k


def test_which_ratios_make_a_grid():
    assert [grid_cell(1 - r) for r in (0.75, 0.8889, 8 / 9, 0.9375)] == [2, 3, 3, 4]
    assert not any(grid_cell(1 - r) for r in (0.0, 0.5, 0.7, 0.9))
