"""Two passes: how a pairwise batch is cut into micro-batches never changes the gradient."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import EngineConfig, Optimizer
from pipeline.core.protocols import Batch, Clock, Embeddings, PairwiseObjective, StepContext, StepOutput
from pipeline.dist.group import process_group
from pipeline.engine.accelerate import AccelerateEngine
from pipeline.engine.accumulate import accumulate
from pipeline.nn.contrastive import info_nce
from pipeline.nn.dropout import SampleDropout, dropping_for
from tests.ranks import start_ranks

CONTEXT = StepContext(seed=7, clock=Clock(3, 48, 160))
BATCH = 16


class Twins(PairwiseObjective):
    """Two towers with dropout and drop path, and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(6, 9), SampleDropout(0.4, "left", False), nn.GELU(), nn.Linear(9, 4))
        self.right = nn.Sequential(nn.Linear(6, 4), SampleDropout(0.3, "right", True))
        self.log_scale = nn.Parameter(torch.tensor([1.5]))
        self.calls = 0

    def embed(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        self.calls += 1
        with dropping_for(batch, ctx):
            return {name: getattr(self, name)(batch["x"]) for name in ("left", "right")}

    def shared(self) -> dict[str, Tensor]:
        return {"scale": self.log_scale.exp()}

    def loss(self, embeddings: Embeddings, ctx: StepContext) -> StepOutput:
        left, right = (functional.normalize(embeddings.rows[n], dim=1, eps=1e-3) for n in ("left", "right"))
        losses = info_nce(left, right, embeddings.shared["scale"], tile=5, reduction="none")
        return StepOutput(losses.mean(), {"scale": embeddings.shared["scale"].detach().squeeze()}, losses.detach())


class Plan:
    def __init__(self, accumulation: int) -> None:
        self.accumulation, self.frozen = accumulation, {}


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(BATCH) * 3
    return {"id": ids, "epoch": torch.ones_like(ids), "x": torch.randn(BATCH, 6, generator=generator)}


def gradients(chunks: tuple[int, ...]) -> list[tuple[float, dict[str, np.ndarray], int, dict[int, float]]]:
    """Of each number of micro-batches: loss, gradients, calls of the towers, and the part of each sample."""
    found = []
    with process_group(1.0) as place:
        for count in chunks:
            torch.manual_seed(0)
            objective = Twins().train()
            config = EngineConfig(name="accelerate", precision="fp32", micro_batch=1)
            engine = AccelerateEngine(objective, config, Optimizer(lr=1.0), Plan(count), place)
            mine = {n: v.chunk(place.world_size)[place.rank] for n, v in batch().items()}
            parts = [
                dict(zip(mine, p, strict=True)) for p in zip(*(v.chunk(count) for v in mine.values()), strict=True)
            ]
            outputs = list(accumulate(engine, parts, CONTEXT))
            assert [b["id"].tolist() for _, b in outputs] == [p["id"].tolist() for p in parts]
            assert len({float(o.loss.detach()) for o, _ in outputs}) == 1
            named = {n: p.grad.numpy() for n, p in objective.named_parameters() if p.grad is not None}
            parts_of = {i: x for o, b in outputs for i, x in zip(b["id"].tolist(), o.losses.tolist(), strict=True)}
            found.append((float(outputs[0][0].loss.detach()), named, objective.calls, parts_of))
    return found


@pytest.mark.parametrize(("world", "chunks"), [(1, (1, 2, 4, 8)), (2, (1, 2, 4))])
def test_chunks_change_neither_the_gradient_nor_the_temperatures(world, chunks):
    ended = start_ranks(world, gradients, chunks=chunks)
    assert [e.problem for e in ended] == [None] * world
    torch.manual_seed(0)
    objective = Twins().train()
    whole = objective(batch(), CONTEXT)
    expected_loss = whole.loss
    expected_loss.backward()
    expected = {n: p.grad.numpy() for n, p in objective.named_parameters()}
    for end in ended:
        for count, (_, found, calls, _) in zip(chunks, end.value, strict=True):
            assert calls == (1 if count == 1 else 2 * count)
            assert found.keys() == expected.keys()
            for name, want in expected.items():
                np.testing.assert_allclose(found[name], want, rtol=1e-5, atol=1e-5 * np.abs(want).max(), err_msg=name)
    losses = [np.mean([end.value[i][0] for end in ended]) for i in range(len(chunks))]
    np.testing.assert_allclose(losses, float(expected_loss.detach()), rtol=1e-5)
    own = dict(zip(batch()["id"].tolist(), whole.losses.tolist(), strict=True))
    for i in range(len(chunks)):
        told = {sample: part for end in ended for sample, part in end.value[i][3].items()}
        assert told == pytest.approx(own, rel=1e-5) and len(told) == BATCH


class Noisy(Twins):
    """Draws from torch's own generator, as a model of others may."""

    def embed(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        x = functional.dropout(batch["x"], 0.5)
        self.seen = [*getattr(self, "seen", []), x.clone()]
        return {"left": self.left[0](x)[:, :4], "right": self.right[0](x)}


class Engine:
    """Calls the objective, and nothing else."""

    def __init__(self, objective: PairwiseObjective) -> None:
        self.objective = objective
        self.place = type("Place", (), {"device": torch.device("cpu")})()

    def move(self, batch: Batch) -> Batch:
        return batch

    def call(self, batch: Batch, ctx: StepContext, **how: object) -> object:
        return self.objective(batch, ctx, **how)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()


def halves() -> Iterator[Batch]:
    for rows in (slice(0, 8), slice(8, 16)):
        yield {n: v[rows] for n, v in batch().items()}


def test_both_passes_see_the_same_generator_and_what_follows_goes_on(lone_group):
    torch.manual_seed(0)
    objective = Noisy()
    list(accumulate(Engine(objective), list(halves()), CONTEXT))
    first, second, again, and_again = objective.seen
    assert torch.equal(first, again) and torch.equal(second, and_again) and not torch.equal(first, second)
    follows = torch.rand(4)
    torch.manual_seed(0)
    Noisy()
    for part in halves():
        functional.dropout(part["x"], 0.5)
    assert torch.equal(follows, torch.rand(4))


def test_running_statistics_count_each_micro_batch_once(lone_group):
    objective = Twins()
    norm = objective.left[2] = nn.BatchNorm1d(9)
    list(accumulate(Engine(objective), list(halves()), CONTEXT))
    assert int(norm.num_batches_tracked) == 2 and norm.track_running_stats


BIG = 2**24
"""From here on float32 leaves out whole numbers."""


class Typed(Twins):
    """Rows of every type; samples of equal "number" are each other's positives. Names of rows and shared repeat."""

    def embed(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        left = functional.normalize(self.left[0](batch["x"]).float(), dim=1)
        return {
            "scale": left,
            "half": left.bfloat16(),
            "double": left.double(),
            "number": BIG + batch["id"] % 4,
            "chosen": batch["id"] % 2 == 0,
        }

    def loss(self, embeddings: Embeddings, ctx: StepContext) -> StepOutput:
        rows, scale = embeddings.rows, embeddings.shared["scale"]
        self.types = {name: value.dtype for name, value in rows.items()}
        same = (rows["number"][:, None] == rows["number"]) & rows["chosen"][:, None]
        cosines = scale * (rows["scale"] @ rows["scale"].T) + rows["double"] @ rows["double"].T
        loss = -(cosines.log_softmax(dim=1) * same).sum() / len(same) + rows["half"].float().square().mean()
        return StepOutput(loss.float(), {})


def typed(names: tuple[tuple[str, int, str], ...]) -> list[list[tuple[dict[str, str], dict[str, np.ndarray]]]]:
    """Of each engine and precision, in one part and in four: types that the loss saw, and gradients."""
    found = []
    with process_group(1.0) as place:
        for name, stage, precision in names:
            module = importlib.import_module(f"pipeline.engine.{name}")
            make = module.DeepSpeedEngine if name == "deepspeed" else module.AccelerateEngine
            zero = {"zero": stage} if name == "deepspeed" else {}
            both = []
            for count in (1, 4):
                torch.manual_seed(0)
                objective = Typed().train()
                plan = Plan(count)
                plan.global_batch, plan.micro_batch = BATCH, BATCH // count
                config = EngineConfig(name=name, precision=precision, micro_batch=plan.micro_batch, **zero)
                before = {n: p.detach().clone().numpy() for n, p in objective.named_parameters()}
                engine = make(objective, config, Optimizer(name="sgd", lr=1.0, momentum=0, weight_decay=0), plan, place)
                parts = zip(*(v.chunk(count) for v in batch().values()), strict=True)
                list(accumulate(engine, [dict(zip(batch(), part, strict=True)) for part in parts], CONTEXT))
                engine.update(1.0)
                with engine.whole_parameters():
                    moved = {n: before[n] - p.detach().numpy() for n, p in objective.named_parameters()}
                both.append(({n: str(t) for n, t in objective.types.items()}, moved))
            found.append(both)
    return found


def test_rows_keep_their_types_between_the_passes():
    names = (("accelerate", 0, "bf16"), ("deepspeed", 1, "bf16"), ("deepspeed", 3, "fp32"))
    (ended,) = start_ranks(1, typed, names=names)
    assert ended.problem is None
    for how, ((types, whole), (types_of_parts, parts)) in zip(names, ended.value, strict=True):
        assert types == {
            "scale": "torch.float32",
            "half": "torch.bfloat16",
            "double": "torch.float64",
            "number": "torch.int64",
            "chosen": "torch.bool",
        }, how
        assert types_of_parts == types, how
        assert np.linalg.norm(whole["left.0.weight"]) > 1e-3 and abs(whole["log_scale"][0]) > 1e-3
        tolerance = 1e-5 if how[2] == "fp32" else 2e-2
        for name, want in whole.items():
            error = np.linalg.norm(parts[name] - want)
            assert error <= tolerance * max(np.linalg.norm(want), 1e-3), (how, name, error)
