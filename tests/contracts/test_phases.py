"""Objectives with phases: under every engine they do what a plain loop with one torch optimizer per phase does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.config.resolve import resolve
from pipeline.config.schema import RunConfig
from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, Objective
from pipeline.dist.group import process_group
from pipeline.engine.accumulate import accumulate
from pipeline.engine.base import BaseEngine
from pipeline.run.build import build_engine
from tests.contracts.components import (
    CONTEXT,
    VARIANTS,
    build_objective,
    has_phases,
    make_batch,
    names,
    smoke_config,
    stir,
)
from tests.contracts.test_gradients import ENGINES, GLOBAL_BATCH
from tests.ranks import start_ranks

CASES = [
    *((n, world) for n in names() if has_phases(n) for world in (1, 2)),
    *((n, 2) for n in VARIANTS if has_phases(n)),
]
"""Objective and ranks."""
STEPS, CLIP = 3, 0.3
RATES = (2e-3, 5e-3)
"""Of the first phase and of the others."""
UPDATES = (1, 2)
SETTINGS: dict[str, dict[str, Any]] = {"toy_gan": {"limit": 0.1}}
"""So that all that an objective can say about its phases is in use."""
HELD = {"toy_gan": ["critic.0"]}
"""Parameters of the later phases that are not trained in the first step."""


def configured(objective: str, **engine: Any) -> RunConfig:
    """Each phase with settings of its own."""
    table = smoke_config(VARIANTS.get(objective, (objective, {}))[0]).model_dump(exclude_none=True)
    table["run"] |= {"global_batch": GLOBAL_BATCH}
    table["optimizer"] = {"name": "adamw", "lr": RATES[0], "weight_decay": 0.1}
    table["engine"] = engine
    own = {"name": "adamw", "lr": RATES[1], "betas": (0.5, 0.9), "clip": CLIP, "weight_decay": 0.0}
    own["groups"] = [{"prefix": prefix, "frozen_until": "1ba"} for prefix in HELD.get(objective, [])]
    later = list(build_objective(objective).phases())[1:]
    table["phases"] = {phase: {"updates": UPDATES[1], "optimizer": own} for phase in later}
    return RunConfig.model_validate(table)


def weights(objective: Objective) -> NDArray[np.float64]:
    return torch.cat([p.detach().double().flatten() for p in objective.parameters()]).numpy()


def trained(engine: BaseEngine, batch: Batch, config: RunConfig, world: int, rank: int) -> list[NDArray[np.float64]]:
    """Weights after each step."""
    found = []
    micro = config.engine.micro_batch
    mine = range(rank * GLOBAL_BATCH // world, (rank + 1) * GLOBAL_BATCH // world, micro)
    parts = [{field: value[s : s + micro] for field, value in batch.items()} for s in mine]
    for step in range(STEPS):
        engine.before_step(replace(CONTEXT.clock, step=step))
        for phase, repeat, updating in engine.turns():
            ctx = replace(CONTEXT, phase=phase, repeat=repeat)
            assert len(list(accumulate(updating, parts, ctx))) == len(parts)
            own = config.phases.get(phase)
            updating.update(own.optimizer.lr if own and own.optimizer else config.optimizer.lr)
        found.append(weights(engine.objective))
    return found


def all_engines(name: str) -> dict[Any, list[NDArray[np.float64]]]:
    """Of every engine, with and without accumulation, on one rank of a group."""
    found = {}
    with process_group(2.0) as place:
        for engine_name, stage in ENGINES[:-1]:
            for accumulation in (1, 2):
                micro = GLOBAL_BATCH // place.world_size // accumulation
                zero = {"zero": stage} if engine_name == "deepspeed" else {}
                config = configured(name, name=engine_name, precision="fp32", micro_batch=micro, **zero)
                plan = resolve(config, 64, place.world_size)
                objective = stir(build_objective(name, **SETTINGS.get(name, {}))).train()
                batch = make_batch(objective, name, GLOBAL_BATCH)
                engine = build_engine(config, objective, plan, place)
                case = (engine_name, stage, accumulation)
                found[case] = trained(engine, batch, config, place.world_size, place.rank)
    return found


def plain(name: str) -> list[NDArray[np.float64]]:
    """Weights after each step of two torch optimizers, on whole batches, without any engine."""
    objective = stir(build_objective(name, **SETTINGS.get(name, {}))).train()
    batch = make_batch(objective, name, GLOBAL_BATCH)
    named = dict(objective.named_parameters())
    optimizers = {}
    for number, (phase, prefixes) in enumerate(objective.phases().items()):
        mine = [p for n, p in named.items() if n.startswith(tuple(prefixes))]
        if number:
            optimizers[phase] = torch.optim.AdamW(mine, RATES[1], (0.5, 0.9), weight_decay=0.0)
        else:
            groups = [{"params": [p for p in mine if (p.ndim > 1) == high]} for high in (True, False)]
            groups[0]["weight_decay"], groups[1]["weight_decay"] = 0.1, 0.0
            optimizers[phase] = torch.optim.AdamW(groups, RATES[0], (0.9, 0.95))
    held = [p for n, p in named.items() if n.startswith(tuple(f"{prefix}." for prefix in HELD.get(name, [])))]
    found = []
    for step in range(STEPS):
        for number, (phase, optimizer) in enumerate(optimizers.items()):
            for repeat in range(UPDATES[min(number, 1)]):
                objective.zero_grad()
                objective(batch, replace(CONTEXT, phase=phase, repeat=repeat)).loss.backward()
                for parameter in held if step == 0 else []:
                    parameter.grad = None
                if number:
                    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], CLIP)
                optimizer.step()
                with torch.no_grad():
                    for limited, bounds in objective.limits().items():
                        named[limited].clamp_(*bounds)
        found.append(weights(objective))
    return found


@pytest.mark.parametrize(("name", "world"), CASES)
def test_it_trains_as_a_plain_loop_with_an_optimizer_per_phase_does(name, world):
    expected = plain(name)
    ended = start_ranks(world, all_engines, name=name)
    assert [e.problem for e in ended] == [None] * world
    assert not np.allclose(expected[-1], expected[0], atol=1e-4)
    for end in ended:
        assert len(end.value) == 2 * (len(ENGINES) - 1)
        for case, found in end.value.items():
            for step, (one, other) in enumerate(zip(found, expected, strict=True)):
                assert np.abs(one - other).max() < 2e-5, (case, step)


def refusals(name: str) -> list[str]:
    """What is said of a configuration that cannot be."""
    said = []
    with process_group(2.0) as place:
        for engine, strange in [({"name": "deepspeed", "zero": 3}, {}), ({"name": "accelerate"}, {"critik": {}})]:
            table = configured(name, micro_batch=8, **engine).model_dump(exclude_none=True)
            config = RunConfig.model_validate(table | {"phases": strange})
            with pytest.raises(ConfigError) as raised:
                build_engine(config, build_objective(name), resolve(config, 64, 1), place)
            said.append(str(raised.value))
        config = configured(name, name="accelerate", micro_batch=8)
        with pytest.raises(ConfigError) as raised:
            build_engine(config, build_objective("supervised"), resolve(config, 64, 1), place)
        said.append(str(raised.value))
        config = configured("energy", name="deepspeed", zero=3, micro_batch=8)
        with pytest.raises(ConfigError) as raised:
            build_engine(config, build_objective("energy"), resolve(config, 64, 1), place)
        said.append(str(raised.value))
    return said


def test_zero_3_and_unknown_phases_are_refused_with_the_reason():
    (end,) = start_ranks(1, refusals, name="toy_gan")
    assert end.problem is None, end.problem
    stage, unknown, none, second_order = end.value
    assert "engine.zero = 3" in second_order and "'energy'" in second_order and "Set engine.zero = 2" in second_order
    assert "engine.zero = 3" in stage and "generator, critic" in stage and "Set engine.zero = 2" in stage
    assert unknown == "phases.critik: no such phase of 'toy_gan'; did you mean 'critic'?"
    assert none == "phases.critic: objective 'toy_gan' has no phases; remove [phases]"
