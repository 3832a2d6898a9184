"""``sluice check``: all that can be known of a configuration before it runs, the quick part first."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.load import dropped, load, load_suite
from pipeline.config.mistakes import Mistakes
from pipeline.config.provenance import digest
from pipeline.config.resolve import Plan, resolve
from pipeline.config.schema import Group, RunConfig
from pipeline.config.sweep import is_sweep, load_sweep, told
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.manifest import Manifest


def check(path: Path, overrides: Sequence[str], procs: int) -> None:
    """Print the plan of a run, or say that a suite or all runs of a sweep are sound.

    First, without torch: keys, types and values; then the data set and the plan; then, importing them, the settings
    of the components, and whether the model can be built and the data give what it needs.

    Raises:
        ConfigError: with every mistake that was found.
    """
    from pipeline.core import components

    title = str(path)
    if is_sweep(path):
        return _check_sweep(path, overrides, procs)
    config = load(path, overrides)
    for line in dropped(path, overrides):
        print(line)
    if isinstance(config, RunConfig):
        problems = run_problems(config, title, procs, show=True)
        if problems:
            raise Mistakes(title, problems)
    else:
        components.check_suite(config, title)
    print(f"{path} is sound")


def _check_sweep(path: Path, overrides: Sequence[str], procs: int) -> None:
    plan = load_sweep(path, overrides)
    problems: dict[str, list[str]] = {}
    known: dict[str, list[str]] = {}
    for variant in plan.variants:
        # What a seed or a folder is changes nothing of this.
        place = variant.config.run.model_copy(update={"folder": "", "seed": 0})
        mark = digest(variant.config.model_copy(update={"run": place}))
        if mark not in known:
            known[mark] = run_problems(variant.config, str(path), procs)
        for problem in known[mark]:
            problems.setdefault(problem, []).append(variant.name)
    if problems:
        raise Mistakes(str(path), told(problems, len(plan.variants)))
    if plan.suite is not None:
        importlib.import_module("pipeline.core.components").check_suite(load_suite(plan.suite), plan.suite)
    print(f"{path} is sound: {len(plan.variants)} runs in {plan.folder}")


def run_problems(config: RunConfig, title: str, procs: int, *, show: bool = False) -> list[str]:
    """What is wrong with a run whose keys, types and values are sound.

    Args:
        config: of the run.
        title: what it is called in messages.
        procs: ranks.
        show: print its plan on the way.
    """
    from pipeline.core import components
    from pipeline.data.dataset import open_data

    problems: list[str] = []
    data: Manifest | None = None
    try:
        data = open_data(config.data)
        plan = resolve(config, data.samples, procs, title)
        if show:
            print(plan_table(config, plan), flush=True)
    except DataError as error:
        problems.append(f"data.train: {error}")
    except Mistakes as mistakes:
        problems += mistakes.problems
    except ConfigError as error:
        problems.append(str(error))
    if config.online is not None:
        try:
            components.check_online(load_suite(config.online.suite), config.online.suite)
        except Mistakes as mistakes:
            problems += mistakes.problems
        except ConfigError as error:
            problems.append(f"online.suite: {error}")
    try:
        components.check_run(config, title)
        if data is not None:
            # By name, since it imports torch; and only with settings that are sound.
            problems += importlib.import_module("pipeline.run.soundness").problems(config, title)
    except Mistakes as mistakes:
        problems += mistakes.problems
    return problems


def plan_table(config: RunConfig, plan: Plan) -> str:
    """What a run will do, in a dozen lines."""
    every = {"log": plan.log_every, "checkpoint": plan.checkpoint_every, "showcase": plan.showcase_every}
    train = config.data.train
    sources = [train] if isinstance(train, str) else [source.path for source in train]
    rows = {
        "objective": config.objective.name,
        "engine": f"{config.engine.name}, {config.engine.precision}"
        + (f", ZeRO {config.engine.zero}" if config.engine.name == "deepspeed" else ""),
        "data": f"{' + '.join(sources)}: {plan.samples:,} samples",
        "global batch": f"{plan.global_batch:,} = {plan.world_size} ranks x {plan.micro_batch} samples"
        f" x {plan.accumulation} accumulated",
        "length": f"{config.run.length} = {plan.total_steps:,} steps = {plan.total_samples:,} samples",
        "epoch": f"{plan.steps_per_epoch:,.6g} steps",
        "learning rate": f"{plan.peak_lr:.4g} at most, {plan.schedule.name}"
        + (f", {plan.warmup_steps:,} steps of warm-up" if plan.warmup_steps else ", no warm-up")
        + (f", {plan.cooldown_steps:,} of cool-down" if plan.cooldown_steps else ""),
        **{f"  {group.prefix}": _difference(group, plan) for group in config.optimizer.groups},
        "every": ", ".join(f"{name} {steps:,} steps" if steps else f"{name} never" for name, steps in every.items()),
        "run folder": config.run.folder,
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


def _difference(group: Group, plan: Plan) -> str:
    """What is done with a group of parameters that is not done with the rest."""
    first, end = plan.frozen.get(group.prefix, (0, 0))
    said = [
        "frozen" if group.frozen else "",
        f"{group.lr:g} x the learning rate" if group.lr != 1 else "",
        f"weight decay {group.weight_decay:g}" if group.weight_decay is not None else "",
        f"frozen from step {first:,} to {end:,}" if first < end else "",
    ]
    return ", ".join(filter(None, said)) or "as the rest"
