import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional

from pipeline.core.errors import ConfigError
from pipeline.nn.conditioning import Conditions, Told
from pipeline.nn.unet import Norm, UNet, UNetConfig, attend

SMALL = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "attention": (8,)}


def build(size=(16, 16), *, channels=3, out=3, classes=0, token_width=None, stirred=True, **settings):
    torch.manual_seed(0)
    net = UNet(
        UNetConfig(**(SMALL | settings)), size, channels=channels, out=out, classes=classes, token_width=token_width
    )
    if stirred:
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.05 * torch.randn_like(p))
    return net.eval()


def conditions(b, classes=0, tokens=None):
    return Conditions(torch.linspace(0, 900, b), Told(torch.arange(b) % classes if classes else None, tokens))


def test_the_network_of_ho_et_al_has_its_size():
    """35.7M parameters in the paper; 35,746,307 in its code, counted."""
    with torch.device("meta"):
        net = UNet(UNetConfig(), (32, 32), channels=3, out=3)
    assert sum(p.numel() for p in net.parameters()) == 35_746_307


def test_at_first_it_says_nothing_at_all():
    """So that the squared error of the noise begins at the noise's own variance (O10)."""
    net = build(stirred=False)
    assert not net(torch.randn(2, 3, 16, 16), conditions(2)).any()


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (32, 16)])
@pytest.mark.parametrize("resample", ["conv", "residual"])
def test_shapes_and_taps(size, resample):
    net = build(size, out=6, resample=resample, attention=(), scale_shift=True)
    x = torch.randn(2, 3, *size)
    assert net(x, conditions(2)).shape == (2, 6, *size)
    walked = {name: h.shape[1] for name, h in net.walk(x, conditions(2))}
    assert walked == net.taps and list(walked) == list(net.taps)


@pytest.mark.parametrize("scale_shift", [False, True])
def test_a_block_is_the_papers(scale_shift):
    net = build(scale_shift=scale_shift)
    block = net.down["down_1_0"].block
    x, embedding = torch.randn(2, 8, 8, 8), torch.randn(2, 32)
    group = lambda h, n: functional.group_norm(h, n.num_groups, n.weight, n.bias, n.eps)  # noqa: E731
    conv = lambda h, c: functional.conv2d(h, c.weight.permute(0, 3, 1, 2), c.bias, padding=c.weight.shape[1] // 2)  # noqa: E731
    h = conv(functional.silu(group(x, block.norm1)), block.conv1)
    told = (embedding @ block.told.weight.T + block.told.bias)[..., None, None]
    shifted = group(h, block.norm2) * (1 + told[:, :16]) + told[:, 16:] if scale_shift else None
    h = group(h + told, block.norm2) if shifted is None else shifted
    h = conv(functional.silu(h), block.conv2)
    expected = conv(x, block.shortcut) + h
    torch.testing.assert_close(block(x, embedding), expected, rtol=1e-5, atol=1e-5)


def test_attention_is_the_papers():
    q, k, v = torch.randn(2, 5, 8), torch.randn(2, 7, 8), torch.randn(2, 7, 8)
    found = attend(q, k, v, heads=2)
    for head in range(2):
        cut = slice(4 * head, 4 * head + 4)
        weights = (q[..., cut] @ k[..., cut].transpose(1, 2) / math.sqrt(4)).softmax(-1)
        torch.testing.assert_close(found[..., cut], weights @ v[..., cut], rtol=1e-5, atol=1e-6)


def test_attention_is_where_it_was_asked_for():
    net = build((32, 32), multipliers=(1, 1, 2), attention=(16,))
    having = {name for part in (net.down, net.middle, net.up) for name, step in part.items()
              if getattr(step, "attention", None) is not None}  # fmt: skip
    assert having == {"down_1_0", "middle_0", "up_1_0", "up_1_1"}


def test_norm_is_fp32_under_autocast_and_with_bf16_weights():
    torch.manual_seed(0)
    norm = Norm(8)
    with torch.no_grad():  # values that bf16 rounds
        norm.weight.copy_(1 + torch.randn(8) / 100)
        norm.bias.copy_(torch.randn(8))
    x = (torch.randn(2, 8, 16, 16) * 3 + 100).bfloat16()

    def exact():
        return functional.group_norm(x.float(), norm.num_groups, norm.weight.float(), norm.bias.float(), norm.eps)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = norm(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, exact().bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(norm.bfloat16()(x), exact().bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("channels", [4, 12, 20, 48, 128, 136, 192])
def test_groups_divide_the_channels(channels):
    norm = Norm(channels)
    assert channels % norm.num_groups == 0 and norm.num_groups <= 32 and channels // norm.num_groups >= 4


def test_it_listens_to_time_class_and_text():
    net = build(classes=3, token_width=6)
    x, tokens = torch.randn(2, 3, 16, 16), torch.randn(2, 5, 6)
    given = conditions(2, 3, tokens)
    first = net(x, given)
    for other in (
        given._replace(time=given.time + 7),
        given._replace(told=given.told._replace(label=torch.tensor([3, 3]))),
        given._replace(told=given.told._replace(tokens=tokens.roll(1, 2))),
    ):
        assert (net(x, other) - first).abs().amax(dim=(1, 2, 3)).min() > 1e-5
    torch.testing.assert_close(
        net(x, given._replace(told=given.told._replace(tokens=tokens.flip(1)))), first
    )  # a set: no positions of its own


def test_samples_do_not_see_each_other():
    net = build(classes=3)
    x, given = torch.randn(4, 3, 16, 16), conditions(4, 3)
    whole = net(x, given)
    part = net(x[1:3], Conditions(given.time[1:3], Told(given.told.label[1:3])))
    torch.testing.assert_close(part, whole[1:3], rtol=1e-5, atol=1e-6)


def test_answers_are_fp32_whatever_the_weights():
    net = build()
    x = torch.randn(2, 3, 16, 16)
    exact = net(x, conditions(2))
    rough = net.to(torch.bfloat16)(x, conditions(2))
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.1 * exact.abs().max().item())


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="multiples of 4"):
        build((30, 32), multipliers=(1, 1, 1))
    with pytest.raises(ConfigError, match="no feature map of height 7; there are 16, 8"):
        build(attention=(8, 7))
    with pytest.raises(ConfigError, match="does not divide"):
        build(head_dim=5)
    with pytest.raises(ValidationError, match="multiple"):
        UNetConfig(channels=10)


def test_every_weight_learns():
    net = build(classes=2, token_width=6, resample="residual", scale_shift=True).train()
    net(torch.randn(2, 3, 16, 16), conditions(2, 2, torch.randn(2, 4, 6))).square().mean().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert not any(isinstance(m, nn.Dropout) for m in net.modules())
