"""What all objectives of adaptation do: several targets, labelled ones, batch norm by domain, refusals."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.core.batch import batch_of
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.protocols import DataFacts, SetFacts
from tests.unit.objectives.adaptation import CLASSES, CTX, LABELS, NET, SIZE, VIT, at, batch, build, facts, images

ALL = ("adapt_dan", "adapt_wdan", "adapt_coral", "adapt_dann", "adapt_drcn")


@pytest.mark.parametrize("name", ALL)
def test_a_target_that_is_not_there_and_a_source_without_classes_are_refused(name):
    with pytest.raises(ConfigError, match=r"adapts to the data set 'sketch' beside the first \(there: target\); add"):
        build(name, targets=["sketch"], **VIT)
    with pytest.raises(ConfigError, match="at least two classes"):
        build(name, DataFacts(SIZE, (), beside=facts().beside), **VIT)
    with pytest.raises(ConfigError, match=r"has no batch norm; leave it out"):
        build(name, batch_norm="domain", **VIT)
    one = DataFacts(SIZE, CLASSES, 100, ("one",), facts().beside, sources=((0, 0),))
    with pytest.raises(ConfigError, match=r"there is one \(one\); name several sources"):
        build(name, one, per_source=True, **VIT)


def test_classes_of_the_target_are_not_looked_at_and_may_be_others():
    """Open and partial label sets: the target's labels are no part of the batch, so that they cannot be used."""
    other = facts(target=SetFacts(50, ("b", "x", "y"), ("ink",), 100))
    for name in ALL:
        objective = build(name, other, **VIT)
        assert "target_label" not in objective.needs
        assert objective(batch(), CTX).loss.isfinite()


def test_a_label_that_no_class_has_is_named():
    wrong = batch() | {"label": torch.tensor([0, 1, 2, 3, 4, 0])}
    with pytest.raises(DataError, match="labels run from 0 to 4, but the manifest names 4 classes"):
        build("adapt_coral", **VIT)(wrong, CTX)


def test_targets_follow_each_other_along_the_run():
    three = ("first", "second", "third")
    known = facts(**{name: SetFacts(50, CLASSES, (name,), 100 + 50 * i) for i, name in enumerate(three)})
    objective = build("adapt_coral", known, targets=three, layers=["features"], **VIT)
    assert [objective.target_at(p) for p in (0, 0.3, 0.34, 0.66, 0.67, 1.0)] == [
        *("first", "first", "second", "second", "third", "third")
    ]
    several = batch()
    for i, name in enumerate(three):
        several |= {f"{name}_id": several["id"] + 100 * (1 + i), f"{name}_epoch": several["epoch"]}
        several[f"{name}_image"] = images(6, 5 + i)
    for progress, name in ((0.1, "first"), (0.5, "second"), (0.9, "third")):
        alone = several | {f"{other}_image": several[f"{other}_image"] * 0 for other in three if other != name}
        assert torch.equal(objective(several, at(progress)).loss, objective(alone, at(progress)).loss)
        blind = several | {f"{name}_image": several[f"{name}_image"] * 0}
        assert not torch.equal(objective(several, at(progress)).loss, objective(blind, at(progress)).loss)


def test_labelled_samples_of_the_target_are_learned_by_the_names_of_their_classes():
    known = facts(labelled=SetFacts(5, ("d", "a"), ("ink",), 150))
    objective = build("adapt_coral", known, weight=0.0, **VIT)
    assert objective.needs["labelled_label"] == "int64[B]"
    few = batch()
    few |= {"labelled_id": few["id"] + 150, "labelled_epoch": few["epoch"], "labelled_image": images(6, 9)}
    few["labelled_label"] = few["id"] % 2
    output = objective(few, CTX)
    with torch.no_grad():
        source = objective.seen(few["image"], batch_of(few), CTX)[1]
        other = objective.seen(few["labelled_image"], batch_of(few, "labelled"), CTX)[1]
    expected = functional.cross_entropy(source, few["label"]) + functional.cross_entropy(
        other, torch.tensor([3, 0, 3, 0, 3, 0])
    )
    torch.testing.assert_close(output.loss.detach(), expected)
    for classes, said in ((("d", "z"), "has the class 'z', which data.train has not"), ((), "has no classes")):
        with pytest.raises(ConfigError, match=said):
            build("adapt_coral", facts(labelled=SetFacts(5, classes, ("ink",), 150)), **VIT)


def statistics(objective):
    return [(m.running_mean.clone(), m.running_var.clone()) for m in objective.modules() if isinstance(m, _BatchNorm)]


def test_batch_norm_by_domain_keeps_the_targets_statistics_and_has_the_sources_beside_them():
    bright = batch()
    bright["target_image"] = 255 - bright["image"] // 8
    joint, by_domain = (build("adapt_coral", weight=0.0, batch_norm=how, **NET) for how in ("joint", "domain"))
    before = statistics(by_domain)
    with torch.no_grad():
        losses = {objective: objective(bright, CTX).loss for objective in (joint, by_domain)}
        # Each domain by itself, on a network of its own with the same weights.
        alone = {}
        for name in ("", "target"):
            plain = build("adapt_coral", weight=0.0, **NET)
            part = batch_of(bright, name)
            logits = plain.seen(part["image"], part, CTX)[1]
            alone[name] = statistics(plain)
            if not name:
                expected = functional.cross_entropy(logits, bright["label"])
    torch.testing.assert_close(losses[by_domain], expected)
    assert not torch.allclose(losses[joint], expected, atol=1e-4)
    torch.testing.assert_close(statistics(by_domain), alone["target"])
    with by_domain.statistics.within(by_domain):
        torch.testing.assert_close(statistics(by_domain), alone[""])
    torch.testing.assert_close(statistics(by_domain), alone["target"])
    assert not torch.allclose(alone[""][0][0], alone["target"][0][0], atol=1e-3)
    assert not torch.equal(before[0][0], alone["target"][0][0])
    # Both are in a checkpoint.
    again = build("adapt_coral", weight=0.0, batch_norm="domain", **NET)
    again.load_state_dict(by_domain.state_dict())
    with again.statistics.within(again):
        torch.testing.assert_close(statistics(again), alone[""])


def test_layers_are_found_by_name_and_what_is_none_is_refused():
    objective = build("adapt_dan", layers=["layer1", "features", "logits"], **NET)
    assert set(objective(batch(), CTX).metrics) >= {"mmd_layer1", "mmd_features", "mmd_logits"}
    with pytest.raises(ConfigError, match=r"layers: ResNet has no block 'layer9'; there are .*or take 'features'"):
        build("adapt_dan", layers=["layer9"], **NET)
    with pytest.raises(ConfigError, match="blocks cannot be read under"):
        build("adapt_dan", layers=["blocks.0"], checkpointing=True, **VIT)


@pytest.mark.parametrize("name", ["adapt_dan", "adapt_wdan", "adapt_coral", "adapt_dann", "adapt_drcn", "group_dro"])
def test_labels_are_smoothed_over_all_classes(name):
    plain, smooth = (build(name, label_smoothing=s, **VIT)(batch(), CTX).metrics["classification"] for s in (0.0, 0.3))
    logits = build(name, **VIT).seen(batch()["image"], batch_of(batch()), CTX)[1]
    torch.testing.assert_close(smooth, functional.cross_entropy(logits, LABELS, label_smoothing=0.3).detach())
    assert plain != smooth
