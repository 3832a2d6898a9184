import math

import pytest
import torch

from pipeline.nn.conditioning import Conditions, Embedding, SampleDropout


def test_sinusoids_are_those_of_the_paper_and_stay_fp32_in_bf16():
    embedding = Embedding("sinusoidal", 8, 8, 0)
    with torch.no_grad():
        embedding.time1.weight.copy_(torch.eye(8))
        embedding.time2.weight.copy_(torch.eye(8))
        embedding.time1.bias.fill_(30.0)  # SiLU is the identity there
        embedding.time2.bias.zero_()
    time = torch.tensor([0.0, 1.0, 500.0, 999.0])
    expected = [
        [math.cos(t / 10000 ** (i / 4)) for i in range(4)] + [math.sin(t / 10000 ** (i / 4)) for i in range(4)]
        for t in time.tolist()
    ]
    found = embedding(Conditions(time)) - 30
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-4)
    rough = embedding.to(torch.bfloat16)
    with torch.no_grad():
        rough.time1.bias.zero_()
        one, other = (rough(Conditions(torch.tensor([t]))) for t in (998.0, 999.0))
    assert (one - other).abs().max() > 0.3  # bf16 cannot tell 998 from 999


def test_no_class_is_one_more_row():
    embedding = Embedding("sinusoidal", 8, 8, classes=3)
    assert embedding.label is not None and embedding.label.weight.shape == (4, 8)
    same = Conditions(torch.zeros(2), torch.tensor([0, 3]))
    gap = embedding(same).diff(dim=0)[0]
    torch.testing.assert_close(gap, embedding.label.weight[3] - embedding.label.weight[0])


def test_fourier_bands_are_kept_and_sinusoidal_ones_are_not():
    assert "bands" in Embedding("fourier", 8, 8, 0).state_dict()
    assert "bands" not in Embedding("sinusoidal", 8, 8, 0).state_dict()


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_drops_its_part_and_keeps_the_mean(rate):
    keys = torch.randint(0, 2**31, (64, 3), generator=torch.Generator().manual_seed(0))
    out = SampleDropout(rate, 1)(torch.ones(64, 16, 8, 8), keys)
    n = out.numel()
    dropped = float((out == 0).double().mean())
    assert abs(dropped - rate) < 5 * (rate * (1 - rate) / n) ** 0.5
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / (1 - rate)).item()}
    # by sample, by channel and by place alike, and neighbours independent
    for dims in ((1, 2, 3), (0, 2, 3), (0, 1)):
        part = (out == 0).double().mean(dim=dims)
        assert part.var() < 2 * rate * (1 - rate) / (n / part.numel())
    a, b = (out == 0)[..., :-1].double(), (out == 0)[..., 1:].double()
    correlation = float(((a - rate) * (b - rate)).mean()) / (rate * (1 - rate))
    assert abs(correlation) < 5 / a.numel() ** 0.5


def test_dropout_belongs_to_the_sample_and_the_layer():
    keys = torch.randint(0, 2**31, (6, 2), generator=torch.Generator().manual_seed(0))
    x = torch.randn(6, 5, 4, 4)
    first, second = SampleDropout(0.5, 0), SampleDropout(0.5, 1)
    whole = first(x, keys)
    assert torch.equal(first(x[2:4], keys[2:4]), whole[2:4])
    assert not torch.equal(second(x, keys), whole)
    assert torch.equal(first(x, None), x)
    masks = (whole == 0).flatten(1).double()
    assert ((masks[0] - masks[1]).abs().mean() - 0.5).abs() < 0.2
