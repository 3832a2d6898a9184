import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Clock, StepContext
from pipeline.nn.conditioning import Conditions, Told
from pipeline.nn.dit import DiT, DiTConfig
from pipeline.nn.dropout import dropping_for


def build(size=(8, 16), *, out=3, classes=0, stirred=True, **settings):
    torch.manual_seed(0)
    config = DiTConfig(**{"name": "dit", "patch": 4, "dim": 16, "depth": 2, "heads": 2} | settings)
    net = DiT(config, size, channels=3, out=out, classes=classes)
    if stirred:
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return net.eval()


def test_it_has_the_size_of_the_papers_model():
    """DiT-B/4 on ImageNet's latents (32 x 32 x 4, 1000 classes, learned variance): 130M parameters in table 1."""
    with torch.device("meta"):
        net = DiT(DiTConfig(name="dit"), (32, 32), channels=4, out=8, classes=1000)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(130e6, rel=0.01)


def test_at_first_it_says_nothing_and_its_blocks_do_nothing():
    net = build(stirred=False)
    x, given = torch.randn(2, 3, 8, 16), Conditions(torch.tensor([0.0, 500.0]))
    assert not net(x, given).any()
    first, second = (h for _, h in net.walk(x, given))
    assert torch.equal(first, second)


def test_a_block_is_the_papers():
    net = build()
    block, x, told = net.blocks[1], torch.randn(2, 8, 16), torch.randn(2, 16)
    shift1, scale1, gate1, shift2, scale2, gate2 = (told @ block.modulation.weight.T + block.modulation.bias).chunk(
        6, dim=1
    )
    norm = lambda h: functional.layer_norm(h, (16,), eps=1e-6)  # noqa: E731
    h = norm(x) * (1 + scale1[:, None]) + shift1[:, None]
    q, k, v = (h @ block.attention.qkv.weight.T + block.attention.qkv.bias).chunk(3, dim=-1)
    heads = []
    for cut in (slice(0, 8), slice(8, 16)):
        heads.append((q[..., cut] @ k[..., cut].transpose(1, 2) / 8**0.5).softmax(-1) @ v[..., cut])
    y = x + gate1[:, None] * (torch.cat(heads, -1) @ block.attention.proj.weight.T + block.attention.proj.bias)
    h = norm(y) * (1 + scale2[:, None]) + shift2[:, None]
    h = functional.gelu(h @ block.mlp.fc1.weight.T + block.mlp.fc1.bias, approximate="tanh")
    expected = y + gate2[:, None] * (h @ block.mlp.fc2.weight.T + block.mlp.fc2.bias)
    torch.testing.assert_close(block(x, told), expected, rtol=1e-5, atol=1e-5)


def test_shapes_taps_and_that_it_listens():
    net = build(out=6, classes=3)
    x = torch.randn(2, 3, 8, 16)
    given = Conditions(torch.tensor([3.0, 700.0]), Told(torch.tensor([0, 3])))
    first = net(x, given)
    assert first.shape == (2, 6, 8, 16)
    walked = {name: tuple(h.shape) for name, h in net.walk(x, given)}
    assert walked == {name: (2, width, 2, 4) for name, width in net.taps.items()}
    for other in (given._replace(time=given.time + 50), given._replace(told=Told(torch.tensor([1, 2])))):
        assert (net(x, other) - first).abs().amax(dim=(1, 2, 3)).min() > 1e-4
    torch.testing.assert_close(net(x[1:], Conditions(given.time[1:], Told(given.told.label[1:]))), first[1:])
    assert net.to(torch.bfloat16)(x, given).dtype == torch.float32


def test_every_weight_learns_and_dropout_is_the_samples_own():
    net = build(classes=2, dropout=0.5).train()
    x, given = torch.randn(2, 3, 8, 16), Conditions(torch.tensor([3.0, 700.0]), Told(torch.tensor([0, 1])))
    batch = {"id": torch.tensor([4, 9]), "epoch": torch.zeros(2, dtype=torch.int64)}
    with dropping_for(batch, StepContext(0, Clock(0, 0, 1))):
        out, again = net(x, given), net(x, given)
    assert torch.equal(out, again) and not torch.allclose(out, net.eval()(x, given))
    out.square().mean().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="multiples of 4"):
        build((10, 16))
    with pytest.raises(ValidationError, match="does not divide"):
        build(heads=3)
