"""DeepCluster: labels, weights and the fresh classifier, against scikit-learn and a plain reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import normalized_mutual_info_score
from torch.nn import functional

from pipeline.config.schema import EmaConfig, EngineConfig
from pipeline.config.schema import Optimizer as OptimizerConfig
from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, Clock, DataFacts, StepContext
from pipeline.core.random import SampleRandom
from pipeline.dist.group import process_group
from pipeline.engine.base import SingleEngine
from pipeline.engine.ema import Ema
from pipeline.engine.meter import Meter
from pipeline.engine.stopping import StopRequest
from pipeline.engine.surveys import Surveyor
from pipeline.engine.watch import Watch
from pipeline.objectives.deep_cluster import SURVEY, Config, DeepCluster
from tests.contracts.test_gradients import Plan
from tests.ranks import start_ranks

VIT = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
CTX = StepContext(seed=3, clock=Clock(6, 48, 96))
SAMPLES = 60


def build(**settings: Any) -> DeepCluster:
    torch.manual_seed(0)
    defaults = {"encoder": "vit_tiny_patch16_224", "encoder_args": VIT, "clusters": 5, "components": 6}
    return DeepCluster(Config(**defaults | settings), DataFacts((16, 16), (), samples=SAMPLES)).train()


def batch(first: int = 0, count: int = SAMPLES) -> Batch:
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (SAMPLES, 3, 16, 16), dtype=torch.uint8, generator=generator)
    ids = torch.arange(first, first + count)
    return {"id": ids, "epoch": torch.zeros_like(ids), "image": image[ids]}


def survey(model: DeepCluster, ctx: StepContext = CTX) -> None:
    with torch.no_grad():
        rows = model.eval().look(SURVEY, batch(), ctx)
        model.surveyed(SURVEY, rows | {"id": batch()["id"]}, ctx)
    model.train()


def test_clusters_are_scikit_learns_of_whitened_features_at_unit_length(lone_group):
    model = build()
    before = model.labels.clone()
    with torch.no_grad():
        x = model.eval().encoder(batch()["image"]).double().numpy()
    unit = functional.normalize(torch.from_numpy(PCA(6, whiten=True, svd_solver="full").fit_transform(x))).numpy()
    draws = SampleRandom(3, "deep_cluster.centres", torch.full((SAMPLES,), 6), torch.arange(SAMPLES)).uniform()
    start = unit[draws.argsort()[:5].numpy()]
    expected = KMeans(5, init=start, n_init=1, algorithm="lloyd", max_iter=20, tol=0).fit_predict(unit)
    survey(model)
    assert model.labels.tolist() == expected.tolist()
    assert model.sizes.tolist() == torch.bincount(model.labels, minlength=5).tolist()
    out = model(batch(0, 8), CTX)
    assert float(out.metrics["nmi"]) == pytest.approx(normalized_mutual_info_score(before, expected), abs=1e-6)
    assert float(out.metrics["clusters"]) == 5
    assert float(out.metrics["largest"]) == pytest.approx(max(model.sizes.tolist()) / SAMPLES)


def test_every_clustering_begins_with_other_samples_and_is_the_same_again(lone_group):
    first, again, other = build(), build(), build()
    survey(first)
    survey(again)
    survey(other, StepContext(seed=3, clock=Clock(7, 56, 96)))
    assert torch.equal(first.labels, again.labels) and not torch.equal(first.labels, other.labels)
    survey(first)
    assert float(first.agreement) == pytest.approx(1)


def test_clusters_count_alike_whatever_their_sizes(lone_group):
    """The mean loss over the data set is the mean over clusters of the mean over their samples."""
    model = build()
    survey(model)
    model.sizes[:] = torch.tensor([0, 30, 20, 9, 1])
    model.labels[:] = torch.repeat_interleave(torch.arange(5), model.sizes)
    with torch.no_grad():
        loss = model(batch(), CTX).loss
        cross = functional.cross_entropy(model.head(model.encoder(batch()["image"])), model.labels, reduction="none")
    expected = torch.stack([cross[model.labels == k].mean() for k in range(1, 5)]).mean()
    torch.testing.assert_close(loss, expected)


def test_before_the_first_survey_labels_are_drawn_and_the_classifier_is_the_papers(lone_group):
    model = build(clusters=40, components=3)
    assert len(model.labels.unique()) > 20 and int(model.sizes.sum()) == SAMPLES
    assert not model.head.bias.any() and float(model.head.weight.detach().std()) == pytest.approx(0.01, rel=0.1)


def test_more_clusters_than_samples_are_refused():
    with pytest.raises(ConfigError, match=r"objective\.clusters: 61 clusters of a data set of 60 samples"):
        build(clusters=61)


class All:
    """All samples, of which each rank has a part."""

    batches = 1

    def __init__(self, rank: int, world: int) -> None:
        self.part = batch(rank * SAMPLES // world, SAMPLES // world)

    def __iter__(self) -> Any:
        return iter([self.part])

    def ledger(self) -> list[dict[str, Any]]:
        return []


def renewed(engine_name: str, stage: int) -> dict[str, Any]:
    """Parameters, optimizer's state and averages of the classifier around a survey, after a step of AdamW."""
    with process_group(2.0) as place:
        model = build()
        plan = Plan(place.world_size, 1)
        zero = {"zero": stage} if engine_name == "deepspeed" else {}
        config = EngineConfig(name=engine_name, precision="fp32", micro_batch=plan.micro_batch, **zero)
        if engine_name == "deepspeed":
            from pipeline.engine.deepspeed import DeepSpeedEngine as Engine
        else:
            from pipeline.engine.accelerate import AccelerateEngine as Engine
        engine: SingleEngine = Engine(model, config, OptimizerConfig(lr=0.1), plan, place)
        engine.ema = Ema(EmaConfig(decay=0.5), engine.slots())
        mine = batch(place.rank * plan.micro_batch, plan.micro_batch)
        engine.backward(engine.forward(mine, CTX, last=True).loss, last=True)
        engine.update(0.1)
        engine.after_step(CTX.clock)

        def held() -> dict[str, Any]:
            parts = [*engine.trained(writing=False), *engine.ema.fragments()]
            return {part.name: part.data.numpy().copy() for part in parts}

        before = held()
        watch = Watch(place.device, StopRequest(Path("/nonexistent")))
        Surveyor(engine, Meter(place.device, place.world_size), watch, seed=1).make(
            SURVEY, All(place.rank, place.world_size), CTX.clock
        )
        after = held()
        with engine.whole_parameters():
            weight = model.head.weight.detach().numpy().copy()
        loss = engine.forward(mine, CTX, last=True).loss  # what the forward uses is what the slots hold
        return {"before": before, "after": after, "weight": weight, "loss": float(loss.detach())}


@pytest.mark.parametrize(("engine", "stage"), [("accelerate", 0), ("deepspeed", 1), ("deepspeed", 3)])
def test_a_survey_begins_the_classifier_anew_and_the_optimizer_forgets_it_alone(engine, stage):
    ended = start_ranks(2, renewed, engine_name=engine, stage=stage)
    assert [e.problem for e in ended] == [None] * 2
    for end in ended:
        before, after = end.value["before"], end.value["after"]
        assert before.keys() == after.keys()
        for name, value in after.items():
            own = name.endswith(("head.weight", "head.bias"))
            if not own or name.startswith("optimizer/step"):
                assert np.array_equal(value, before[name]), name
            elif name.startswith("optimizer/"):
                assert before[name].any() and not value.any(), name
            elif name.startswith("ema/"):
                assert np.array_equal(value, after[name.replace("ema/", "model/")]), name
        assert np.array_equal(end.value["weight"], ended[0].value["weight"])
        assert float(end.value["weight"].std()) == pytest.approx(0.01, rel=0.2)
    whole = ended[0].value["weight"].flatten()
    parts = [part for end in ended if (part := end.value["after"].get("model/head.weight")) is not None]
    assert all(np.array_equal(part, whole) or part.size < whole.size for part in parts)
    if parts[0].size < whole.size:
        assert np.array_equal(np.concatenate(parts), whole)
