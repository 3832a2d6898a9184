import pytest
import torch
from torch import nn

from pipeline.nn.convolution import Conv, PatchProjection


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_it_is_torchs_in_value_and_gradient(kernel, stride):
    torch.manual_seed(0)
    own, other = Conv(5, 7, kernel, stride), nn.Conv2d(5, 7, kernel, stride, padding=kernel // 2)
    with torch.no_grad():
        own.weight.copy_(other.weight.permute(0, 2, 3, 1))
        own.bias.copy_(other.bias)
    x = torch.randn(2, 5, 8, 6)
    one, two = x.clone().contiguous(memory_format=torch.channels_last).requires_grad_(), x.clone().requires_grad_()
    out, expected = own(one), other(two)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own.weight.grad.permute(0, 3, 1, 2), other.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own.bias.grad, other.bias.grad, rtol=1e-4, atol=1e-4)


def test_it_begins_as_torchs():
    torch.manual_seed(0)
    own, other = Conv(30, 40, 3), nn.Conv2d(30, 40, 3)
    for one, two in ((own.weight, other.weight), (own.bias, other.bias)):
        assert one.abs().max().item() == pytest.approx(two.abs().max().item(), rel=0.1)
        assert one.std().item() == pytest.approx(two.std().item(), rel=0.3)


def test_nothing_is_converted():
    x, upstream = (torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last) for _ in range(2))
    conv = Conv(16, 16, 3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        conv(x.requires_grad_()).backward(upstream)
    assert conv.weight.grad.is_contiguous() and x.grad.is_contiguous(memory_format=torch.channels_last)
    assert "aten::clone" not in {event.key for event in seen.key_averages()}


@pytest.mark.parametrize(("patch", "size", "bias"), [((4, 4), (12, 8), True), ((4, 2), (14, 9), False)])
def test_patches_are_projected_as_by_torchs_convolution(patch, size, bias):
    torch.manual_seed(0)
    other = nn.Conv2d(3, 7, patch, patch, bias=bias)
    names = list(other.state_dict())
    own = PatchProjection.of(other)
    assert list(own.state_dict()) == names and own.weight is other.weight
    x = torch.randn(2, 3, *size)
    gradients = []
    for layer in (own, other):
        out = layer(x)
        out.square().sum().backward()
        gradients.append((out.detach(), *(p.grad for p in layer.parameters())))
        layer.zero_grad()
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
