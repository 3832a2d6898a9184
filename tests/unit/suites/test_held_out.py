"""What chooses the best checkpoint is not trained on, and the labels of a test stream choose nothing."""

import pytest
import torch

from pipeline.config.schema import HeldOut, RunConfig, SuiteConfig
from pipeline.core.errors import ConfigError
from pipeline.evals import linear_probe, logistic_regression
from pipeline.suites.online import check_held_out
from tests.contracts.components import ListStream, context, numbers, smoke_config
from tests.unit.evals.test_knn import Identity


def run(**data) -> RunConfig:
    config = smoke_config("supervised")
    return config.model_copy(update={"data": config.data.model_copy(update={"train": "shards/a"} | data)})


def suite(**rule) -> SuiteConfig:
    held_out = {"part": "held_out"} | rule
    streams = {"train": {"path": "shards/a"}, "val": {"path": "shards/./a/", "held_out": held_out}}
    return SuiteConfig.model_validate({"streams": streams, "evals": [{"name": "knn"}]})


def rest(**rule) -> HeldOut:
    return HeldOut.model_validate({"part": "rest"} | rule)


@pytest.mark.parametrize(
    "held_out",
    [None, rest(seed=1), rest(share=0.05), HeldOut(part="held_out"), HeldOut(part="held_out", share=0.5)],
    ids=str,
)
def test_a_run_that_trains_on_what_is_held_out_is_refused(held_out):
    with pytest.raises(ConfigError, match=r"'val' is held out of shards/a \(held_out of 0.1, seed 0\), and the"):
        check_held_out(run(held_out=held_out), suite())


@pytest.mark.parametrize("held_out", [rest(), rest(share=0.2)], ids=str)
def test_the_rest_and_less_than_it_may_be_trained_on(held_out):
    check_held_out(run(held_out=held_out), suite())


def test_other_data_and_mixed_sources():
    check_held_out(run(train="shards/b"), suite())
    sources = [{"path": "shards/b"}, {"path": "shards/a", "held_out": {"part": "rest"}}]
    data = run().data.model_dump(mode="json", exclude_none=True)
    good = type(run().data).model_validate(data | {"train": sources})
    check_held_out(run().model_copy(update={"data": good}), suite())
    bad = type(good).model_validate(data | {"train": [{"path": "shards/b"}, {"path": "shards/a"}]})
    with pytest.raises(ConfigError, match="is held out of shards/a"):
        check_held_out(run().model_copy(update={"data": bad}), suite())


SETTINGS = {
    "logistic_regression": (
        logistic_regression.LogisticRegression,
        logistic_regression.Config,
        {"c": (1e-3, 0.1, 10.0)},
    ),
    "linear_probe": (linear_probe.LinearProbe, linear_probe.Config, {"rates": (0.01, 0.1), "steps": 30}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_all_labels_of_the_test_stream_changed_choose_the_same(name, lone_group, tmp_path):
    cls, config, settings = SETTINGS[name]
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(120) % 3
    x = torch.randn(120, 6, generator=generator) + 2 * torch.nn.functional.one_hot(label, 6)
    found = []
    for test in (label, (label + 1) % 3):
        streams = {"train": ListStream(x, label), "val": ListStream(x.flip(0), test.flip(0))}
        found.append(numbers(cls(config(**settings)), context({"image": Identity()}, streams, folder=tmp_path)))
    chosen = [n for n in found[0] if n.rpartition("/")[2] in ("c", "c_at_edge", "rate", "rate_at_edge", "converged")]
    assert chosen
    for number in chosen:
        assert found[0][number].value == found[1][number].value
    top1 = f"{name}/top1"
    assert found[0][top1].value > 0.8 and found[1][top1].value < 0.2
