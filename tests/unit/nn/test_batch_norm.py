"""Batch norm over all ranks against one batch norm over the whole batch, in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from pipeline.dist.group import process_group
from pipeline.nn.batch_norm import GlobalBatchNorm, average_statistics, frozen_statistics, synchronise
from tests.ranks import start_ranks

SAMPLES = 12


def network() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), BatchNormAct2d(3), nn.Flatten(), nn.BatchNorm1d(12, affine=False)
    ).double()
    made[1].weight.data.uniform_(0.5, 2)
    made[2].bias.data.uniform_(-1, 1)
    return made.train()


def images() -> torch.Tensor:
    return 5 + torch.randn(SAMPLES, 2, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def weights() -> torch.Tensor:
    return torch.randn(SAMPLES, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def step(net: nn.Module, rows: slice) -> dict[str, Any]:
    """Output, gradients of a mean over the rows, and what the network keeps."""
    out = net(images()[rows])
    (out * weights()[rows]).sum(dim=1).mean().backward()
    kept = {n: b.numpy() for n, b in net.named_buffers()}
    return kept | {"out": out.detach().numpy()} | {f"d {n}": p.grad.numpy() for n, p in net.named_parameters()}


def on_a_rank() -> dict[str, Any]:
    with process_group(1.0) as place:
        size = SAMPLES // place.world_size
        net = synchronise(network())
        assert [type(m) for m in net if isinstance(m, nn.modules.batchnorm._BatchNorm)] == [GlobalBatchNorm] * 3
        return step(net, slice(place.rank * size, (place.rank + 1) * size))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_statistics_and_gradients_are_those_of_the_whole_batch(world):
    ended = start_ranks(world, on_a_rank)
    assert [e.problem for e in ended] == [None] * world
    expected = step(network(), slice(None))
    for name, want in expected.items():
        found = [e.value[name] for e in ended]
        joined = np.concatenate(found) if name == "out" else np.mean(found, axis=0)
        np.testing.assert_allclose(joined, want, rtol=1e-9, atol=1e-10, err_msg=name)
        if not name.startswith(("d ", "out")):
            assert all(np.array_equal(f, found[0]) for f in found)


def test_names_stay_and_evaluation_is_torchs(lone_group):
    plain, synced = network(), synchronise(network())
    assert list(plain.state_dict()) == list(synced.state_dict())
    assert torch.equal(plain.eval()(images()), synced.eval()(images()))


def test_frozen_statistics_normalise_by_the_batch_and_keep_nothing(lone_group):
    net = synchronise(network())
    before = {n: b.clone() for n, b in net.named_buffers()}
    with frozen_statistics(net):
        frozen = net(images())
    assert all(torch.equal(b, before[n]) for n, b in net.named_buffers())
    assert torch.equal(frozen, net(images()))
    assert not all(torch.equal(b, before[n]) for n, b in net.named_buffers())


def averaged() -> list[float]:
    with process_group(1.0) as place:
        norm = nn.BatchNorm1d(2)
        norm.running_mean += place.rank
        norm.running_var += torch.tensor([2.0, 4.0]) * place.rank
        average_statistics(nn.ModuleList([norm]))
        return [*norm.running_mean.tolist(), *norm.running_var.tolist()]


def test_running_statistics_of_ranks_are_averaged():
    assert [e.value for e in start_ranks(2, averaged)] == [[0.5, 0.5, 2.0, 3.0]] * 2
