"""Going on from a checkpoint: whether it is still the same run, what of it has changed, and taking all parts there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from pipeline.config.changes import Change, changes, refuse
from pipeline.config.mistakes import Mistakes
from pipeline.config.resolve import Plan, learning_rate, resolve
from pipeline.config.schema import RunConfig
from pipeline.core.components import OBJECTIVES, check_component
from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.core.protocols import Clock, Stream
from pipeline.engine.base import BaseEngine
from pipeline.engine.checkpoint import CheckpointStore, Saved
from pipeline.engine.fragments import EMA
from pipeline.run.build import check_model


@dataclass(frozen=True)
class Beginning:
    """Where a start of a run takes it up."""

    saved: Saved | None
    """The newest whole checkpoint; None: from the beginning."""
    clock: Clock
    changes: Sequence[Change] = ()
    """Settings that are not those of the checkpoint."""


def find_beginning(config: RunConfig, plan: Plan, store: CheckpointStore, title: str) -> Beginning:
    """Look for the newest whole checkpoint, and hold the configuration against the one that it was made with.

    All ranks together; nothing is written.

    Args:
        config: of this start.
        plan: the same in numbers.
        store: the run's checkpoints; what there is to know of the change is said through its ``say``.
        title: what the configuration is called in a message.

    Raises:
        ConfigError: this would be another run, or it would end before the checkpoint.
        CheckpointError: no checkpoint is whole.
    """
    saved = store.newest(to_go_on=True)
    if saved is None:
        return Beginning(None, Clock(0, 0, plan.total_samples))
    trained = f"step {saved.step} of {config.run.folder}"
    before = saved.state["config"]
    found = changes(_whole(before), _whole(config.model_dump(mode="json", exclude_none=True)))
    refuse(found, config.run.change, title, trained)
    clock = Clock(saved.step, saved.state["samples"], plan.total_samples)
    if clock.samples > clock.total_samples:
        raise ConfigError(
            f"{title}: run.length = {config.run.length} ends at step {plan.total_steps}, and {saved.folder} is there "
            f"already; give it more, or go back: sluice resume {config.run.folder} --from-step STEP"
        )
    store.say(f"resumed from {saved.folder} at step {saved.step}")
    if found and clock.samples < clock.total_samples:
        store.say(f"from step {saved.step} on, settings are others: {'; '.join(map(str, found))}")
        _say_rates(before, plan, clock.samples, store.say)
    return Beginning(saved, clock, found)


def _whole(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration with every default written out, so that what is only written otherwise is no change."""
    try:
        values = RunConfig.model_validate(values).model_dump(mode="json", exclude_none=True)
        config = RunConfig.model_validate(values)
        own = check_component(OBJECTIVES, config.objective, "", ("objective",)).model_dump(mode="json")
    except (ValidationError, Mistakes):  # of a program that knew other settings
        return values
    return values | {"objective": {"name": config.objective.name, **own}}


def _say_rates(before: dict[str, Any], plan: Plan, samples: int, say: Callable[[str], None]) -> None:
    """Say it when the learning rate jumps because its schedule is another."""
    try:
        config = RunConfig.model_validate(before)
        batch = {"micro_batch": config.run.global_batch}  # the rate does not depend on how a batch is shared out
        config = config.model_copy(update={"engine": config.engine.model_copy(update=batch)})
        old = resolve(config, plan.samples, 1)
    except (ValidationError, ConfigError):
        return
    last, planned, now = (
        learning_rate(p, at) for p, at in ((old, samples - plan.global_batch), (old, samples), (plan, samples))
    )
    if abs(now - planned) > 1e-6 * max(now, planned):
        say(f"the learning rate goes from {last:.4g} to {now:.4g}, as the schedule is another")


def resume(engine: BaseEngine, stream: Stream, saved: Saved) -> list[str]:
    """Bring engine and stream to where ``saved`` is. Returns what there is to say about it.

    Raises:
        CheckpointError: it is of another model or of another order of samples.
    """
    stream.check(saved.state["stream"])
    check_model(saved, engine.expected())
    engine.make_state(saved.tensors)
    fragments = list(engine.held())
    averages = [] if engine.ema is None else list(engine.ema.averages)
    new = [name for name in averages if not any(stored.startswith(f"{name}/") for stored in saved.tensors)]
    if powers := [name for name in new if name != EMA]:
        raise CheckpointError(
            f"{saved.folder} holds no {', '.join(powers)}: a power-function average (ema.power) is of a whole run and "
            "cannot begin in the middle; leave it out, or start a new run"
        )
    saved.fill((f for f in fragments if f.name.partition("/")[0] not in new), engine.place.rank)
    engine.publish()
    if engine.ema is not None and new:
        engine.ema.begin()
        return [f"the moving average of [ema] begins at step {saved.step}, as the parameters are"]
    return []
