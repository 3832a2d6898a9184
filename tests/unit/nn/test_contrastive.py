"""The losses over all pairs against the dense matrix in float64, at every world size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from pipeline.dist import collectives
from pipeline.dist.group import process_group
from pipeline.nn import contrastive
from tests.ranks import start_ranks

GLOBAL = 12
"""Pairs over all ranks: divisible by 1, 2, 3 and 4."""
WIDTH = 7
SCALES = (1.0, 14.3, 100.0)
NAMES = ("info_nce", "sigmoid_loss", "nt_xent", "in_batch_nce", "queue_nce")
Found = dict[str, Tensor]


def inputs(dtype: torch.dtype) -> Found:
    generator = torch.Generator().manual_seed(5)
    draw = torch.randn(2 * GLOBAL + 10, WIDTH, generator=generator, dtype=torch.float64)
    unit = functional.normalize(draw, dim=1).to(dtype)
    return {"rows": unit[:GLOBAL], "columns": unit[GLOBAL : 2 * GLOBAL], "queue": unit[2 * GLOBAL :]}


def dense(name: str, rows: Tensor, columns: Tensor, queue: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The definition, with the whole matrix."""
    here = torch.arange(len(rows))
    if name == "info_nce":
        logits = scale * rows @ columns.T
        return (functional.cross_entropy(logits, here) + functional.cross_entropy(logits.T, here)) / 2
    if name == "sigmoid_loss":
        z = 2 * torch.eye(len(rows), dtype=rows.dtype) - 1
        return -functional.logsigmoid(z * (scale * rows @ columns.T + bias)).sum() / len(rows)
    if name == "nt_xent":
        views, loss = torch.cat([rows, columns]), torch.zeros((), dtype=rows.dtype)
        for i in range(len(views)):
            other = (i + len(rows)) % len(views)
            kept = [k for k in range(len(views)) if k != i]
            logits = (scale * views[kept] @ views[i]).exp()
            loss = loss - (logits[kept.index(other)] / logits.sum()).log() / len(views)
        return loss
    if name == "in_batch_nce":
        return functional.cross_entropy(scale * rows @ columns.detach().T, here)
    logits = torch.cat([(rows * columns.detach()).sum(1, keepdim=True), rows @ queue.T], dim=1)
    return functional.cross_entropy(scale * logits, torch.zeros_like(here))


def tiled(name: str, rows: Tensor, columns: Tensor, queue: Tensor, scale: Tensor, bias: Tensor, **how: Any) -> Tensor:
    if name == "sigmoid_loss":
        return contrastive.sigmoid_loss(rows, columns, scale, bias, **how)
    if name == "queue_nce":
        return contrastive.queue_nce(rows, columns, queue, scale, **how)
    return getattr(contrastive, name)(rows, columns, scale, **how)


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def leaves(data: Found, part: slice, dtype: torch.dtype, scale: float) -> list[Tensor]:
    values = [data["rows"][part], data["columns"][part], torch.tensor([scale], dtype=dtype)]
    return [v.clone().requires_grad_() for v in (*values, torch.tensor([-3.0], dtype=dtype))]


def cases(dtype: torch.dtype) -> list[tuple[str, float, dict[str, Any]]]:
    ways: list[dict[str, Any]] = [{"tile": 1}, {"tile": 5}, {}]
    if dtype == torch.float64:
        ways.append({"tile": 4, "share": "blocks"})
    return [
        (name, scale, how)
        for name in NAMES
        for scale in SCALES
        for how in ways
        if "share" not in how or name in ("info_nce", "sigmoid_loss", "nt_xent")
    ]


def on_a_rank(dtype: torch.dtype) -> list[list[Any]]:
    """Loss, and gradients of own rows, own columns, scale and bias, of every case."""
    data, found = inputs(dtype), []
    with process_group(1.0) as place:
        size = GLOBAL // place.world_size
        part = slice(place.rank * size, (place.rank + 1) * size)
        for name, scale, how in cases(dtype):
            rows, columns, s, b = own = leaves(data, part, dtype, scale)
            loss = tiled(name, rows, columns, data["queue"], s, b, **how)
            found.append([t.detach().double().numpy() for t in (loss.view(1), *gradients(loss, own))])
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_loss_and_gradients_are_those_of_the_whole_matrix(world, dtype):
    ended = start_ranks(world, on_a_rank, dtype=dtype)
    assert [e.problem for e in ended] == [None] * world
    bound = 1e-10 if dtype == torch.float64 else 1e-5
    data = inputs(torch.float64)
    for number, (name, scale, how) in enumerate(cases(dtype)):
        rows, columns, s, b = exact = leaves(data, slice(None), torch.float64, scale)
        loss = dense(name, rows, columns, data["queue"], s, b)
        expected = [loss.detach().view(1), *gradients(loss, exact)]
        parts = [[torch.from_numpy(t) for t in e.value[number]] for e in ended]
        # Each rank's loss is the mean over its own rows: the mean over ranks is the loss. Features' gradients are
        # sums over the ranks' losses, so `world` times that; scale and bias are averaged by the engine.
        joined = [torch.stack([p[0] for p in parts]).mean(0)]
        joined += [torch.cat([p[i] for p in parts]) / world for i in (1, 2)]
        joined += [torch.stack([p[i] for p in parts]).mean(0) for i in (3, 4)]
        for what, got, want in zip(("loss", "rows", "columns", "scale", "bias"), joined, expected, strict=True):
            # A gradient is a sum of terms of the size of scale * softmax / batch, which may all but cancel.
            size = max(float(want.norm()), 1e-3 * scale)
            error = float((got - want).norm()) / size
            assert error < bound, f"{name} {what} at scale {scale}, {how}, {world} ranks: {error:.1e}"


def test_gradients_by_finite_differences(lone_group):
    data = inputs(torch.float64)
    own = leaves(data, slice(0, 5), torch.float64, 3.0)
    for name in NAMES:

        def loss(rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, name: str = name) -> Tensor:
            return tiled(name, rows, columns, data["queue"], scale, bias, tile=2)

        if name in ("in_batch_nce", "queue_nce"):  # keys get no gradient
            fixed = own[1].detach()
            assert torch.autograd.gradcheck(lambda r, s, f=fixed, g=loss: g(r, f, s, own[3]), (own[0], own[2]))
        else:
            assert torch.autograd.gradcheck(loss, tuple(own))


@pytest.mark.parametrize("name", ["info_nce", "sigmoid_loss", "nt_xent"])
def test_logits_stay_fp32_under_bf16_autocast(name, lone_group):
    generator = torch.Generator().manual_seed(0)
    draw = functional.normalize(torch.randn(2, 128, 64, generator=generator, dtype=torch.float64), dim=2)
    # Pairs that agree as loosely as they do early in training; a perfect match has no gradient to compare.
    draw[1] = functional.normalize(draw[0] + 4 * draw[1], dim=1)
    wide = [draw[0].clone().requires_grad_(), draw[1].clone().requires_grad_()]
    scale, bias = torch.tensor([100.0], dtype=torch.float64), torch.tensor([-10.0], dtype=torch.float64)
    exact = torch.autograd.grad(dense(name, *wide, draw[0], scale, bias), wide)
    low = [w.detach().float().requires_grad_() for w in wide]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = tiled(name, *low, low[0], scale.float(), bias.float())
    assert loss.dtype == torch.float32
    for got, want in zip(torch.autograd.grad(loss, low), exact, strict=True):
        assert float((got.double() - want).norm() / want.norm()) < 0.005


def test_a_scale_too_large_for_exp_is_no_trouble(lone_group):
    rows = functional.normalize(torch.randn(6, 4), dim=1).requires_grad_()
    loss = contrastive.info_nce(rows, rows.detach(), torch.tensor([1e4]), tile=4)
    loss.backward()
    assert loss.isfinite() and rows.grad is not None and rows.grad.isfinite().all()


class Counted:
    """Counts what arrives at a rank from the others, by the textbook cost of each collective."""

    def __init__(self, monkeypatch: Any) -> None:
        self.bytes = 0.0
        for name, cost in (
            (collectives.GATHER, lambda w, out, x: (w - 1) * x.nbytes),
            (collectives.SCATTER, lambda w, out, x: (w - 1) * out.nbytes),
            ("all_reduce", lambda w, x, *op: 2 * (w - 1) / w * x.nbytes),
        ):
            monkeypatch.setattr(dist, name, self.wrap(getattr(dist, name), cost))

    def wrap(self, inner: Any, cost: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.bytes += cost(dist.get_world_size(), *args)
            return inner(*args, **kwargs)

        return counted


def count_traffic() -> list[tuple[float, int]]:
    data, found = inputs(torch.float32), []
    with process_group(1.0) as place, pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch)
        size = GLOBAL // place.world_size
        part = slice(place.rank * size, (place.rank + 1) * size)
        for name in ("info_nce", "sigmoid_loss", "in_batch_nce"):
            counted.bytes = 0.0
            rows, columns, s, b = own = leaves(data, part, torch.float32, 10.0)
            gradients(tiled(name, rows, columns, data["queue"], s, b), own)
            found.append(counted.bytes)
    return found


def test_traffic_is_the_formula_and_half_of_gathering_both_sides():
    world, size = 4, GLOBAL // 4
    ended = start_ranks(world, count_traffic)
    assert [e.problem for e in ended] == [None] * world
    both_sides = 4 * (world - 1) * size * WIDTH * 4
    for end in ended:
        nce, sigmoid, keys = end.value
        assert nce == contrastive.traffic_bytes(size, WIDTH, world, both=True)
        assert sigmoid == contrastive.traffic_bytes(size, WIDTH, world, both=False) == both_sides / 2
        assert keys == both_sides / 4  # keys get no gradient, so nothing goes home
    # 5 numbers per sample beside 2 * 512: half a per cent more than half.
    assert contrastive.traffic_bytes(64, 512, 8, both=True) / (4 * 7 * 64 * 512 * 4) < 0.503


def part_of(name: str, i: int, rows: Tensor, columns: Tensor, queue: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """What sample i adds, by its own row and column of the whole matrix."""
    if name == "nt_xent":
        views, parts = torch.cat([rows, columns]), []
        for view, other in ((i, i + len(rows)), (i + len(rows), i)):
            logits = scale * views @ views[view]
            parts.append(torch.cat([logits[:view], logits[view + 1 :]]).logsumexp(0) - logits[other])
        return torch.stack(parts).mean()
    if name == "queue_nce":
        own = scale * rows[i] @ columns[i]
        return torch.cat([own.view(1), (scale * queue @ rows[i]).view(-1)]).logsumexp(0) - own
    across, down = scale * columns @ rows[i], scale * rows @ columns[i]
    if name == "sigmoid_loss":
        z = -torch.ones(len(rows), dtype=rows.dtype)
        z[i] = 1
        return functional.softplus(-z * (across + bias)).sum()
    if name == "in_batch_nce":
        return across.logsumexp(0) - across[i]
    return (across.logsumexp(0) + down.logsumexp(0)) / 2 - across[i]


@pytest.mark.parametrize("name", NAMES)
def test_parts_are_those_of_their_own_samples(name, lone_group):
    data = inputs(torch.float64)
    scale, bias = torch.tensor([9.0], dtype=torch.float64), torch.tensor([-2.0], dtype=torch.float64)
    rows, columns, queue = data["rows"], data["columns"], data["queue"]
    found = tiled(name, rows, columns, queue, scale, bias, tile=4, reduction="none")
    expected = [part_of(name, i, rows, columns, queue, scale[0], bias) for i in range(len(rows))]
    torch.testing.assert_close(found, torch.stack(expected))
    assert found.std() > 0.01, "parts that are alike would hide an exchange"
