"""What happens to a tile: against torch's own functions, and the same when it is traced for a compiler."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.nn import tile_kernels
from pipeline.nn.tile_kernels import PLAIN, Kernels, kernels_for


@pytest.fixture(params=["plain", "traced"])
def kernels(request, monkeypatch) -> Iterator[Kernels]:
    if request.param == "plain":
        yield PLAIN
        return
    # Traced and differentiated as for Triton, but run by torch's own kernels: generating others takes a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    tile_kernels.compiled.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")  # torch's own, while it traces
        yield tile_kernels.compiled()
    tile_kernels.compiled.cache_clear()


def tile(rows: int, columns: int) -> Tensor:
    return 30 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)


@pytest.mark.parametrize("dim", [0, 1])
def test_log_sum_exp_of_tiles_of_several_sizes(kernels, dim):
    whole = tile(9, 20)
    whole[2, 3] = whole[:, 7] = whole[4] = -torch.inf
    parts = whole.split(7, dim)  # 7, 7 and 6 wide, or 7 and 2 high
    places = whole.shape[1 - dim]
    largest, total = torch.full((places,), -torch.inf).double(), torch.zeros(places).double()
    for part in parts:
        largest, total = kernels.add_exp(part.clone(), largest, total, dim)
    torch.testing.assert_close(largest + total.log(), whole.logsumexp(dim))


@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
def test_sums_and_gradients_are_autograds(kernels, size):
    logits, up, up_column = tile(*size), *(torch.arange(n, dtype=torch.float64) - 1.5 for n in size)
    leaf = logits.clone().requires_grad_()
    torch.testing.assert_close(kernels.softplus_sum(logits.clone()), functional.softplus(logits).sum(1))
    for function, got in (
        (lambda x: up @ x.logsumexp(1), kernels.softmax_gradient(logits.clone(), logits.logsumexp(1), up, None, None)),
        (
            lambda x: up @ x.logsumexp(1) + up_column @ x.logsumexp(0),
            kernels.softmax_gradient(logits.clone(), logits.logsumexp(1), up, logits.logsumexp(0), up_column),
        ),
        (lambda x: up @ functional.softplus(x).sum(1), kernels.sigmoid_gradient(logits.clone(), up)),
    ):
        torch.testing.assert_close(got, torch.autograd.grad(function(leaf), leaf)[0])


def test_only_an_accelerator_with_many_pairs_compiles():
    assert kernels_for(torch.device("cpu"), 2**40) is PLAIN
    assert kernels_for(torch.device("cuda"), tile_kernels.FUSE_FROM - 1) is PLAIN
    assert kernels_for(torch.device("cuda"), tile_kernels.FUSE_FROM) is tile_kernels.compiled()
