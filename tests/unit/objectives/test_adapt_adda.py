"""ADDA: what begins where, what moves in which phase, and labels that are inverted."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import DataFacts
from pipeline.dist.group import process_group
from pipeline.engine.phases import members
from pipeline.objectives.supervised import Config as SupervisedConfig
from pipeline.objectives.supervised import Supervised
from pipeline.run.frozen import fill, leave_out
from tests.unit.objectives.adaptation import CLASSES, CTX, NET, SIZE, batch, build, facts, gradients

CRITIC = {"critic": {"hidden": [5]}}


def first_stage(path, classes=CLASSES):
    torch.manual_seed(7)
    known = DataFacts(SIZE, classes)
    model = Supervised(SupervisedConfig(**NET, head_std=0.5), known).train()
    with torch.no_grad():
        model(batch(), CTX)  # statistics of batch norm that are not those of the start
    config = {"objective": {"name": "supervised", **NET}}
    facts_of = {"config": json.dumps(config), "facts": json.dumps(known.plain())}
    save_file(model.state_dict(), path, facts_of)
    return model.eval()


def phase(name):
    return replace(CTX, phase=name)


def test_it_begins_as_the_first_stage_and_a_checkpoint_replaces_that(tmp_path):
    path = str(tmp_path / "stage.safetensors")
    model = first_stage(path)
    objective = build("adapt_adda", source=path, **NET, **CRITIC)
    with process_group(1.0):
        origins = fill(objective)
    assert list(origins) == ["source"]
    image = batch()["target_image"]
    objective.eval()
    for part in ("image", "logits"):
        torch.testing.assert_close(objective.encoders()[part](image), model.encoders()[part](image))
    assert objective.train().source.training is False and objective.encoder.training
    # What is trained is the critic and the target's encoder; the classifier stays.
    trained = {name for name, p in objective.named_parameters() if p.requires_grad}
    assert all(name.startswith(("critic.", "encoder.")) for name in trained)
    assert set(members(objective)) == {"critic", "target"}
    moved = {
        k: v + 1 if k.startswith("encoder.") and v.is_floating_point() else v for k, v in objective.state_dict().items()
    }
    objective.load_state_dict(moved)
    assert not torch.allclose(objective.encoder(image), objective.source.encoder(image))
    leave_out(objective)
    objective.eval().encoders()["logits"](image)


def test_the_critic_is_told_the_truth_and_the_encoder_the_opposite():
    objective = build("adapt_adda", source="x", **NET, **CRITIC)
    before = [m.running_mean.clone() for m in objective.encoder.modules() if isinstance(m, _BatchNorm)]
    output = objective(batch(), phase("critic"))
    after = [m.running_mean for m in objective.encoder.modules() if isinstance(m, _BatchNorm)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "counted once, in the encoder's phase"
    with torch.no_grad():
        source = objective.source.encoder(batch()["image"])
        target = objective.features(
            {"id": batch()["target_id"], "epoch": batch()["epoch"], "image": batch()["target_image"]}, CTX
        )
    says = objective.critic(torch.cat([source, target]))[:, 0]
    truth = torch.tensor([1.0] * 6 + [0.0] * 6)
    torch.testing.assert_close(output.loss, functional.binary_cross_entropy_with_logits(says, truth))
    assert all(name.startswith("critic.") for name in gradients(objective, output.loss))
    output = objective(batch(), phase("target"))
    torch.testing.assert_close(
        output.loss.detach(), functional.binary_cross_entropy_with_logits(says[6:], 1 - truth[6:]).detach()
    )
    assert any(name.startswith("encoder.") for name in gradients(objective, output.loss))


def test_a_first_stage_of_other_classes_or_another_network_and_a_missing_target_are_refused(tmp_path):
    path = str(tmp_path / "stage.safetensors")
    first_stage(path, ("a", "b", "d", "c"))
    with process_group(1.0), pytest.raises(ConfigError, match="number 2 is 'd' there, 'c' in the data"):
        fill(build("adapt_adda", source=path, **NET, **CRITIC))
    first_stage(path)
    wider = NET | {"encoder_args": NET["encoder_args"] | {"channels": [8, 8, 8, 16]}}
    with process_group(1.0), pytest.raises(ConfigError, match=r"the objective's source: .*stage\.safetensors"):
        fill(build("adapt_adda", source=path, **wider, **CRITIC))
    with pytest.raises(ConfigError, match="adapts to the data set 'sketch'"):
        build("adapt_adda", source=path, target="sketch", **NET)
    with pytest.raises(ConfigError, match="the classes of the first stage"):
        build("adapt_adda", DataFacts(SIZE, (), beside=facts().beside), source=path, **NET)
