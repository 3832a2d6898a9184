"""MoCo against a plain reading of it, under every engine."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import EngineConfig
from pipeline.config.schema import Optimizer as OptimizerConfig
from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, Clock, DataFacts, Embeddings, StepContext
from pipeline.core.random import SampleRandom
from pipeline.dist.group import process_group
from pipeline.engine import optimizers
from pipeline.engine.accumulate import accumulate
from pipeline.nn.batch_norm import GlobalBatchNorm
from pipeline.objectives.moco import Config, MoCo
from tests.contracts.test_gradients import ENGINES, Plan, descent
from tests.ranks import start_ranks

VIT = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
RESNET = {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8], "zero_init_last": False}
GLOBAL, STEPS, RATE = 8, 3, 0.5


def build(**settings: Any) -> MoCo:
    torch.manual_seed(0)
    defaults = {"encoder": "vit_tiny_patch16_224", "encoder_args": VIT, "dim": 6, "queue": 20, "momentum": 0.7}
    return MoCo(Config(**defaults | settings), DataFacts((16, 16), ())).train()


def batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (2, GLOBAL, 3, 16, 16), dtype=torch.uint8, generator=generator)
    ids = torch.arange(GLOBAL) + 100 * step
    return {"id": ids, "epoch": torch.zeros_like(ids), "image": images[0], "image2": images[1]}


def context(step: int) -> StepContext:
    return StepContext(seed=5, clock=Clock(step, step * GLOBAL, STEPS * GLOBAL))


def train(version: int, accumulation: int) -> dict[str, dict[str, np.ndarray]]:
    """The state after a few steps under every engine, on one rank of a group."""
    optimizers.build = descent
    found = {}
    with process_group(2.0) as place:
        plan = Plan(place.world_size, accumulation)
        for name, stage in ENGINES:
            zero = {"zero": stage} if name == "deepspeed" else {}
            config = EngineConfig(name=name, precision="fp32", micro_batch=plan.micro_batch, **zero)
            if name == "deepspeed":
                from pipeline.engine.deepspeed import DeepSpeedEngine as Engine
            else:
                from pipeline.engine.accelerate import AccelerateEngine as Engine
            engine = Engine(build(version=version), config, OptimizerConfig(lr=1.0), plan, place)
            for step in range(STEPS):
                mine = {n: v.chunk(place.world_size)[place.rank] for n, v in batch(step).items()}
                parts = [
                    dict(zip(mine, p, strict=True))
                    for p in zip(*(v.chunk(accumulation) for v in mine.values()), strict=True)
                ]
                list(accumulate(engine, parts, context(step)))
                engine.update(RATE)
                engine.after_step(context(step + 1).clock)
            with engine.whole_parameters():
                state = engine.objective.state_dict()
                found[f"{name} {stage}"] = {n: t.detach().numpy().copy() for n, t in state.items()}
    return found


def plain() -> dict[str, Tensor]:
    """Version 2, as the paper's pseudocode has it, on the whole batch."""
    model = build()
    trained = [p for p in model.parameters() if p.requires_grad]
    encoder, head = copy.deepcopy(model.encoder), copy.deepcopy(model.head)
    queue, pointer = model.queue.clone(), 0
    for step in range(STEPS):
        images, ctx = batch(step), context(step)
        q = functional.normalize(model.head(model.encoder(model.view(images, ctx, "image"))), dim=1)
        with torch.no_grad():
            k = functional.normalize(head(encoder(model.view(images, ctx, "image2"))), dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / 0.2
        loss = functional.cross_entropy(logits, torch.zeros(GLOBAL, dtype=torch.int64))
        gradients = torch.autograd.grad(loss, trained)
        with torch.no_grad():
            for p, g in zip(trained, gradients, strict=True):
                p -= RATE * g
            for old, new in ((encoder, model.encoder), (head, model.head)):
                for a, b in zip(old.parameters(), new.parameters(), strict=True):
                    a.copy_(0.7 * a + 0.3 * b)
            for row in k:
                queue[pointer] = row
                pointer = (pointer + 1) % len(queue)
    state = {f"momentum.encoder.{n}": p for n, p in encoder.state_dict().items()}
    state |= {f"momentum.head.{n}": p for n, p in head.state_dict().items()}
    own = {n: p for n, p in model.state_dict().items() if not n.startswith("momentum.")}
    return own | state | {"queue": queue, "filled": torch.tensor([pointer])}


@pytest.mark.parametrize(("world", "accumulation"), [(1, 2), (2, 1), (2, 2)])
def test_version_two_is_the_pseudocode_under_every_engine(world, accumulation):
    ended = start_ranks(world, train, version=2, accumulation=accumulation)
    assert [e.problem for e in ended] == [None] * world
    expected = {n: t.numpy() for n, t in plain().items()}
    start = {n: t.numpy() for n, t in build().state_dict().items()}
    assert not np.allclose(expected["momentum.head.0.weight"], start["momentum.head.0.weight"], atol=1e-4)
    for end in ended:
        for engine, state in end.value.items():
            assert state.keys() == expected.keys()
            for name, want in expected.items():
                np.testing.assert_allclose(state[name], want, rtol=1e-4, atol=1e-5, err_msg=f"{engine} {name}")


def test_version_three_compares_both_ways_within_the_batch(lone_group):
    model = build(version=3, hidden=12)
    images, ctx = batch(0), context(0)
    rows = model.embed(images, ctx)
    here = torch.arange(GLOBAL)
    expected = sum(
        functional.cross_entropy(rows[q] @ rows[k].T / 0.2, here) for q, k in (("query", "key2"), ("query2", "key"))
    )
    torch.testing.assert_close(model(images, ctx).loss, 2 * 0.2 * expected)
    assert not rows["key"].requires_grad and rows["query"].requires_grad and "queue" not in model.state_dict()


def version_three_loss(model: MoCo, first: Tensor, second: Tensor) -> Tensor:
    """facebookresearch/moco-v3, moco/builder.py, ``forward`` and ``contrastive_loss``, on one rank."""

    def contrastive(q: Tensor, k: Tensor) -> Tensor:
        q, k = functional.normalize(q, dim=1), functional.normalize(k, dim=1)
        logits = torch.einsum("nc,mc->nm", q, k) / 0.2
        return functional.cross_entropy(logits, torch.arange(len(q))) * (2 * 0.2)

    assert model.predictor is not None
    q1 = model.predictor(model.head(model.encoder(first)))
    q2 = model.predictor(model.head(model.encoder(second)))
    with torch.no_grad():
        k1 = model.momentum["head"](model.momentum["encoder"](first))
        k2 = model.momentum["head"](model.momentum["encoder"](second))
    return contrastive(q1, k2) + contrastive(q2, k1)


@pytest.mark.parametrize("encoder", [{}, {"encoder": "resnet18", "encoder_args": RESNET, "small_stem": True}])
def test_version_three_takes_each_view_by_itself_as_its_code_does(encoder, lone_group):
    """Colours of the recipe differ between the views, and batch norm over both at once would give other gradients."""
    colours = {"colour": {"brightness": 0.4, "blur": 1.0}, "colour2": {"blur": 0.1, "solarize": 1.0}}
    model = build(version=3, hidden=12, layers=3, **colours, **encoder).double()
    plain, images, ctx = copy.deepcopy(model), batch(0), context(0)
    views = [model.view(images, ctx, name).double() for name in ("image", "image2")]
    expected = version_three_loss(plain, *views)
    expected.backward()
    found = model(images, ctx).loss
    found.backward()
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-6, atol=1e-7)
    own, other = (torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in (model, plain))
    assert float((own - other).norm() / other.norm()) < 1e-5  # unit vectors are in fp32
    for (name, mine), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)  # running statistics too: one update per view


def test_version_threes_predictor_ends_in_a_norm_for_a_transformer_and_in_a_linear_layer_for_a_resnet():
    resnet = build(version=3, encoder="resnet18", encoder_args=RESNET)
    for model, ending in ((build(version=3), GlobalBatchNorm), (resnet, nn.Linear)):
        assert model.predictor is not None and type(model.predictor[-1]) is ending
        assert type(model.head[-1]) is GlobalBatchNorm and not model.head[-1].affine


def test_queries_and_keys_drop_otherwise(lone_group):
    dropping = {"encoder_args": VIT | {"proj_drop_rate": 0.5}, "hidden": 12}
    for version, pairs in ((2, [("query", "key")]), (3, [("query", "query2"), ("key", "key2"), ("query", "key")])):
        model, images = build(version=version, **dropping), batch(0)
        images["image2"] = images["image"]
        model.view = lambda batch, ctx, name: batch[name].float() / 255
        if version == 3:
            model.predictor = nn.Identity()
        rows = model.embed(images, context(0))
        for a, b in pairs:
            assert not torch.allclose(rows[a], rows[b], atol=1e-3), (version, a, b)


def test_version_threes_momentum_rises_to_one():
    keeps = [next(iter(build(version=3).averages(Clock(0, done, 100)))).keep for done in (0, 50, 100)]
    assert keeps == pytest.approx([0.7, 0.85, 1.0])
    assert next(iter(build().averages(Clock(0, 50, 100)))).keep == 0.7


def test_a_queue_shorter_than_a_batch_holds_the_newest(lone_group):
    model = build(queue=5)
    model(batch(0), context(0))
    keys = model._fresh.clone()
    model.after_step(context(1).clock)
    assert torch.equal(model.queue, keys[-5:]) and int(model.filled) == 0


def shuffled() -> dict[str, np.ndarray]:
    with process_group(1.0) as place:
        model = build(encoder="resnet18", encoder_args=RESNET, small_stem=True)
        mine = {n: v.chunk(place.world_size)[place.rank] for n, v in batch(0).items()}
        rows = model.embed(mine, context(0))
        model.loss(Embeddings(rows, {}), context(0))
        model.after_step(context(1).clock)
        kept = {n: b.numpy() for n, b in model.named_buffers() if "running" in n}
        return {"key": rows["key"].numpy(), "query": rows["query"].detach().numpy()} | kept


def test_keys_are_normalised_in_other_company_than_their_queries():
    ended = start_ranks(2, shuffled)
    assert [e.problem for e in ended] == [None, None]
    whole, ctx = batch(0), context(0)
    numbers = SampleRandom(5, "moco.shuffle", whole["epoch"], whole["id"]).uniform().tolist()
    order = sorted(range(GLOBAL), key=numbers.__getitem__)
    keys = torch.empty(GLOBAL, 6)
    model = build(encoder="resnet18", encoder_args=RESNET, small_stem=True)
    for half in (order[: GLOBAL // 2], order[GLOBAL // 2 :]):
        part = {n: v[half] for n, v in whole.items()}
        keys[half] = model._key(model.view(part, ctx, "image2"))["key"]
    found = np.concatenate([e.value["key"] for e in ended])
    np.testing.assert_allclose(found, keys.numpy(), rtol=1e-4, atol=1e-5)
    assert sorted(order[: GLOBAL // 2]) not in ([0, 1, 2, 3], [4, 5, 6, 7])
    # Per rank in training, the same on all ranks in what is saved.
    running = [n for n in ended[0].value if "running" in n]
    assert running and all(np.array_equal(ended[0].value[n], ended[1].value[n]) for n in running)


def test_one_rank_with_norm_batch_is_as_good_as_two(lone_group):
    """What goes through batch norm together, and in which company, is the same as on two ranks of as many images."""
    ended = start_ranks(2, shuffled)
    assert [e.problem for e in ended] == [None, None]
    rows = build(encoder="resnet18", encoder_args=RESNET, small_stem=True, norm_batch=4).embed(batch(0), context(0))
    for name in ("query", "key"):
        together = np.concatenate([e.value[name] for e in ended])
        np.testing.assert_allclose(rows[name].detach().numpy(), together, rtol=1e-4, atol=1e-5)
    alone = build(encoder="resnet18", encoder_args=RESNET, small_stem=True).embed(batch(0), context(0))
    assert not np.allclose(alone["query"].detach(), rows["query"].detach(), atol=1e-3)


def test_parts_drop_for_their_own_samples(lone_group):
    dropping = {"encoder": "resnet18", "encoder_args": RESNET | {"drop_path_rate": 0.5}, "small_stem": True}
    whole, ctx = batch(0), context(0)
    found = build(**dropping, norm_batch=4).embed(whole, ctx)["query"]
    halves, model = [], build(**dropping)
    for rows in (slice(0, 4), slice(4, 8)):
        part = {n: v[rows] for n, v in whole.items()}
        halves.append(model.embed(part, ctx)["query"])
    torch.testing.assert_close(found, torch.cat(halves))


def test_norm_batch_that_does_not_fit(lone_group):
    with pytest.raises(ConfigError, match=r"norm_batch = 3 does not divide the 8 images"):
        build(norm_batch=3).embed(batch(0), context(0))
    with pytest.raises(ValueError, match="version 3 takes the statistics over all ranks"):
        Config(version=3, norm_batch=4)
