import pytest
import torch
import torch.utils.checkpoint

from pipeline.core.protocols import Clock, StepContext
from pipeline.nn.dropout import SampleDropout, dropping_for

CTX = StepContext(3, Clock(0, 0, 1))


def dropped(layer, x, ids, epoch=0):
    with dropping_for({"id": ids, "epoch": torch.full_like(ids, epoch)}, CTX):
        return layer.train()(x)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_it_drops_its_part_and_keeps_the_mean(rate):
    out = dropped(SampleDropout(rate, "a"), torch.ones(64, 16, 8, 8), torch.arange(64))
    n = out.numel()
    share = float((out == 0).double().mean())
    assert abs(share - rate) < 5 * (rate * (1 - rate) / n) ** 0.5
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / (1 - rate)).item()}
    # by sample, by channel and by place alike, and neighbours independent
    for dims in ((1, 2, 3), (0, 2, 3), (0, 1)):
        part = (out == 0).double().mean(dim=dims)
        assert part.var() < 2 * rate * (1 - rate) / (n / part.numel())
    a, b = (out == 0)[..., :-1].double(), (out == 0)[..., 1:].double()
    correlation = float(((a - rate) * (b - rate)).mean()) / (rate * (1 - rate))
    assert abs(correlation) < 5 / a.numel() ** 0.5


def test_it_belongs_to_the_sample_the_epoch_and_the_layer():
    x, ids = torch.randn(6, 5, 4, 4), torch.arange(10, 16)
    first, second = SampleDropout(0.5, "first"), SampleDropout(0.5, "second")
    whole = dropped(first, x, ids)
    assert torch.equal(dropped(first, x[2:4], ids[2:4]), whole[2:4])
    assert not torch.equal(dropped(second, x, ids), whole) and not torch.equal(dropped(first, x, ids, 1), whole)
    assert torch.equal(first.eval()(x), x)
    masks = (whole == 0).flatten(1).double()
    assert ((masks[0] - masks[1]).abs().mean() - 0.5).abs() < 0.2


def test_views_of_a_sample_drop_differently_and_each_as_it_would_alone():
    x, ids = torch.ones(6, 40), torch.arange(3)
    layer = SampleDropout(0.5, "a")
    out = dropped(layer, x, ids)
    assert not torch.equal(out[:3], out[3:])
    part = dropped(layer, x[:2], ids[1:2])
    assert torch.equal(part[0], out[1]) and torch.equal(part[1], out[4])


def test_drop_path_drops_whole_rows():
    out = dropped(SampleDropout(0.5, "a", whole=True), torch.ones(4000, 2, 3), torch.arange(4000))
    rows = out.flatten(1)
    assert (rows == rows[:, :1]).all() and abs(float((rows[:, 0] == 0).double().mean()) - 0.5) < 5 * 0.5 / 4000**0.5


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_anew_in_the_backward_drops_the_same(reentrant):
    layer, ids = SampleDropout(0.5, "a").train(), torch.arange(5)
    x = torch.ones(5, 40, requires_grad=True)
    with dropping_for({"id": ids, "epoch": ids}, CTX):
        out = torch.utils.checkpoint.checkpoint(lambda y: layer(y).square(), x, use_reentrant=reentrant)
    out.sum().backward()
    torch.testing.assert_close(x.grad, 2 * out.detach())  # (2x)^2 where it is kept has slope 8x


def test_outside_of_a_forward_nothing_is_dropped_by_chance():
    with pytest.raises(AssertionError, match="outside of `dropping_for`"):
        SampleDropout(0.5, "a").train()(torch.ones(2, 3))
