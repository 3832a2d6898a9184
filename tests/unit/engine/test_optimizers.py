"""LARS against a plain transcription in numpy, and which optimizer goes with which setting."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.config.schema import Optimizer, RunConfig
from pipeline.engine import optimizers
from tests.contracts.components import build_objective, smoke_config


def test_lars_is_the_rule_of_the_paper():
    generator = np.random.default_rng(0)
    start = {"matrix": generator.normal(size=(3, 4)), "kernel": generator.normal(size=(2, 3, 1, 1)), "bias": np.ones(4)}
    slopes = [{n: generator.normal(size=v.shape) for n, v in start.items()} for _ in range(4)]
    decays = {"matrix": 0.1, "kernel": 0.0, "bias": 0.0}
    p = {n: torch.nn.Parameter(torch.from_numpy(v.copy())) for n, v in start.items()}
    groups = [{"params": [p[n]], "weight_decay": decays[n], "lr_scale": 1.0} for n in start]
    lars = optimizers.LARS(groups, lr=1.0, momentum=0.9)
    w, m = {n: v.copy() for n, v in start.items()}, {n: np.zeros_like(v) for n, v in start.items()}
    for lr, slope in zip((1.0, 2.0, 3.0, 0.5), slopes, strict=True):
        optimizers.set_lr(lars, lr)
        for n in start:
            p[n].grad = torch.from_numpy(slope[n])
            g = slope[n] + decays[n] * w[n]
            if n != "bias":
                g = g * 0.001 * np.linalg.norm(w[n].ravel()) / np.linalg.norm(g.ravel())
            m[n] = 0.9 * m[n] + g
            w[n] = w[n] - lr * m[n]
        lars.step()
        for n in start:
            np.testing.assert_allclose(p[n].detach().numpy(), w[n], rtol=1e-12, err_msg=n)


def test_a_layer_of_zeros_and_a_layer_without_slope_stay_finite():
    zero, flat = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    zero.grad, flat.grad = torch.ones(2, 2), torch.zeros(2, 2)
    optimizers.LARS([{"params": [zero, flat], "weight_decay": 0.0}], lr=0.5, momentum=0.9).step()
    assert torch.equal(zero.detach(), torch.full((2, 2), -0.5)) and torch.equal(flat.detach(), torch.ones(2, 2))


@pytest.mark.parametrize(("name", "kind"), [("adamw", "AdamW"), ("sgd", "SGD"), ("lars", "LARS")])
def test_the_name_decides_and_norms_and_biases_are_not_decayed(name, kind):
    objective = build_objective("simclr")
    built = optimizers.build(objective, Optimizer(name=name, lr=0.3, weight_decay=0.1))
    assert type(built).__name__ == kind
    for group in built.param_groups:
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] > 0}
        assert group.get("momentum", 0.9) == 0.9


def test_all_that_is_trained_is_decayed_on_request():
    """As MoCo's code, which hands all parameters to torch's optimizer."""
    objective = build_objective("moco")
    trained = [name for name, p in objective.named_parameters() if p.requires_grad]
    for decay, spared in (("all", set()), ("matrices", {n for n in trained if n.endswith((".bias", "cls_token"))})):
        found = optimizers.rules(objective, Optimizer(lr=1.0, weight_decay=0.1, decay=decay))
        assert list(found) == trained and {rule.weight_decay for rule in found.values()} <= {0.0, 0.1}
        exempt = {name for name, rule in found.items() if not rule.weight_decay}
        assert not exempt if decay == "all" else spared <= exempt and any("norm" in name for name in exempt)


def test_masked_autoencoders_are_decayed_as_published():
    """Matrices, and the class and mask tokens; no norm, no bias; and position tables are not trained at all."""
    objective = build_objective("mae")
    rules = optimizers.rules(objective, Optimizer(lr=1.0, weight_decay=0.05))
    spared = {name for name, rule in rules.items() if rule.weight_decay == 0}
    assert {name.rpartition(".")[2] for name in spared} == {"weight", "bias"}
    assert all("norm" in name for name in spared if name.endswith("weight"))
    decayed = rules.keys() - spared
    assert {"encoder.cls_token", "decoder.mask_token", "encoder.patch_embed.proj.weight"} <= decayed
    assert not any("norm" in name or name.endswith("bias") or "pos" in name for name in decayed)
    assert len(decayed) == 3 + 4 * 2 + 4 * 1 + 2 and {rule.lr_scale for rule in rules.values()} == {1.0}


def test_settings_of_another_optimizer_and_cut_layers_are_mistakes():
    with pytest.raises(ValueError, match="adamw has no momentum"):
        Optimizer(lr=1, momentum=0.5)
    with pytest.raises(ValueError, match="lars has no betas or eps"):
        Optimizer(lr=1, name="lars", betas=(0.9, 0.9), eps=1e-6)
    table = smoke_config("moco").model_dump(mode="json", exclude_none=True)
    assert RunConfig.model_validate(table) == smoke_config("moco")
    table["optimizer"] = {"name": "lars", "lr": 1.0}
    with pytest.raises(ValueError, match=r"ZeRO cuts to pieces; set engine\.zero = 0"):
        RunConfig.model_validate(table)
    table["engine"]["zero"] = 0
    config = RunConfig.model_validate(table)
    assert RunConfig.model_validate(config.model_dump(mode="json", exclude_none=True)) == config


@pytest.mark.parametrize("limit", [None, 2.0, 100.0])
def test_the_norm_is_that_of_all_gradients_and_only_a_limit_changes_them(limit):
    parameters = [
        torch.nn.Parameter(torch.zeros(2)),
        torch.nn.Parameter(torch.zeros(1)),
        torch.nn.Parameter(torch.ones(1)),
    ]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert optimizers.clip(parameters, limit).item() == pytest.approx(5.0)
    factor = 0.4 if limit == 2.0 else 1.0
    assert parameters[0].grad.tolist() == pytest.approx([3.0 * factor, 0.0]) and parameters[2].grad is None
