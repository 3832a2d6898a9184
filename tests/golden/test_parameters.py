"""The table of parameters of every smoke config: a changed default shows up as a difference in review."""

from __future__ import annotations

import pytest

from pipeline.core import registry
from pipeline.engine.optimizers import rules
from tests.contracts.components import build_objective, smoke_config


@pytest.mark.parametrize("name", registry.names("pipeline.objectives"))
def test_parameter_table(name, golden):
    objective = build_objective(name)
    decided = rules(objective, smoke_config(name).optimizer)
    lines = ["name shape mean std weight_decay lr_scale"]
    for parameter, value in objective.named_parameters():
        shape = "x".join(map(str, value.shape)) or "scalar"
        value = value.detach().double()
        moments = f"{value.mean():.4f} {value.std(unbiased=False):.4f}"
        rule = (
            f"{decided[parameter].weight_decay:g} {decided[parameter].lr_scale:.6g}"
            if parameter in decided
            else "frozen"
        )
        lines.append(f"{parameter} {shape} {moments} {rule}")
    golden(f"parameters/{name}.txt", "\n".join(lines) + "\n", rel=0.02)
