"""From what a person writes to what a run does: steps, accumulation, learning rate. No torch here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from pipeline.config.durations import Duration
from pipeline.config.mistakes import Mistakes
from pipeline.config.schedule import Cooled, Moment, Schedule, schedule
from pipeline.config.schema import Optimizer, RunConfig


@dataclass(frozen=True)
class Plan:
    """A run in numbers, once its data and its number of ranks are known. A step is one update of the optimizer."""

    samples: int
    """In the data set."""
    global_batch: int
    """Samples per step, over all ranks."""
    world_size: int
    micro_batch: int
    """Samples per rank and forward."""
    accumulation: int
    """Forwards per step: global_batch = world_size * micro_batch * accumulation."""
    steps_per_epoch: float
    """Whole when the tail of an epoch is dropped."""
    total_steps: int
    total_samples: int
    """total_steps * global_batch."""
    warmup_steps: int
    cooldown_steps: int
    schedule: Schedule
    peak_lr: float
    """After scaling by the global batch."""
    phase_lr: Mapping[str, float]
    """Peak of each phase that has an optimizer of its own."""
    log_every: int
    """Steps; 0 is never, here and below."""
    checkpoint_every: int
    showcase_every: int
    frozen: dict[str, tuple[int, int]]
    """Steps, the second not included, for which a group of parameters is frozen, by its prefix; not: for all."""


def resolve(config: RunConfig, samples: int, world_size: int, title: str = "plan") -> Plan:
    """The plan of a run.

    Args:
        config: the run.
        samples: in the data set (its manifest's).
        world_size: number of ranks.
        title: what the configuration is called in a message.

    Raises:
        Mistakes: the batch cannot be shared out, the epoch is shorter than a batch, the schedule longer than the run.
    """
    batch, micro = config.run.global_batch, config.engine.micro_batch
    problems = [*_batch_problems(batch, micro, world_size), *_epoch_problems(config, samples)]
    if problems:
        raise Mistakes(title, problems)
    per_epoch = samples // batch if config.data.tail == "drop" else samples / batch
    total = config.run.length.steps(global_batch=batch, steps_per_epoch=per_epoch)

    def steps(duration: Duration, name: str | None = None) -> int:
        """Of a duration; with a name, one that must fit into the run."""
        count = duration.steps(global_batch=batch, steps_per_epoch=per_epoch, total_steps=total)
        if name and count > total:
            problems.append(f"{name}: {duration} are {count} steps, but the run has only {total}")
        return count

    curve = schedule(config.schedule.model_dump(mode="json"), title)
    plan = Plan(
        samples=samples,
        global_batch=batch,
        world_size=world_size,
        micro_batch=micro,
        accumulation=batch // (micro * world_size),
        steps_per_epoch=per_epoch,
        total_steps=total,
        total_samples=total * batch,
        warmup_steps=steps(curve.warmup, "schedule.warmup"),
        cooldown_steps=steps(curve.cooldown, "schedule.cooldown") if isinstance(curve, Cooled) else 0,
        schedule=curve,
        peak_lr=_peak(config.optimizer, batch),
        phase_lr={name: _peak(p.optimizer, batch) for name, p in config.phases.items() if p.optimizer is not None},
        log_every=steps(config.every.log),
        checkpoint_every=steps(config.every.checkpoint),
        showcase_every=steps(config.every.showcase),
        frozen=_frozen(config, steps, total, problems),
    )
    if not problems and plan.warmup_steps + plan.cooldown_steps > total:
        problems.append(
            f"schedule: warm-up ({plan.warmup_steps} steps) and cool-down ({plan.cooldown_steps} steps) "
            f"do not fit into a run of {total} steps"
        )
    if problems:
        raise Mistakes(title, problems)
    return plan


def period(plan: Plan, duration: Duration) -> Fraction:
    """Updates from one time to the next of what recurs every ``duration``; 0: never."""
    per_epoch = Fraction(plan.steps_per_epoch).limit_denominator(plan.global_batch)  # samples / batch, exactly
    return duration.period(global_batch=plan.global_batch, steps_per_epoch=per_epoch, total_steps=plan.total_steps)


def learning_rate(plan: Plan, samples: int) -> float:
    """Learning rate of the update that starts when ``samples`` samples have been seen.

    The curve is taken at the middle of the update, so that neither the first (on a warm-up from zero) nor the last
    (on a decay to zero) is an update by nothing. With s samples seen there: on a warm-up of w, peak * s / w; then the
    schedule's part of the peak; on a cool-down of the last c of n samples, times (n - s) / c.
    """
    seen = samples + plan.global_batch / 2
    warmup, total = plan.warmup_steps * plan.global_batch, plan.total_samples
    cooldown = plan.cooldown_steps * plan.global_batch
    if seen < warmup:
        return plan.peak_lr * seen / warmup
    rate = plan.peak_lr * plan.schedule.part(Moment(seen, warmup, total))
    return rate * min(1.0, max(0.0, (total - seen) / cooldown)) if cooldown else rate


def _frozen(
    config: RunConfig, steps: Callable[[Duration], int], total: int, problems: list[str]
) -> dict[str, tuple[int, int]]:
    """When groups that are frozen for a time are so, those of phases included: a parameter belongs to one phase."""
    found: dict[str, tuple[int, int]] = {}
    groups = [
        (f"{table}.groups[{place}]", group)
        for table, optimizer in config.optimizers().items()
        for place, group in enumerate(optimizer.groups)
    ]
    for where, group in groups:
        first = steps(group.frozen_from) if group.frozen_from else 0
        end = steps(group.frozen_until) if group.frozen_until else total
        if group.frozen_from and group.frozen_until and first >= end:
            problems.append(
                f"{where}: frozen_from = {group.frozen_from} (step {first}) comes after "
                f"frozen_until = {group.frozen_until} (step {end}); write the earlier one first"
            )
        for_a_time = group.frozen_from or group.frozen_until
        if for_a_time and found.setdefault(group.prefix, (first, end)) != (first, end):
            problems.append(f"{where}: {group.prefix!r} is frozen at other times in another table; write it once")
    return found


def phase_learning_rate(plan: Plan, samples: int, phase: str) -> float:
    """That of a phase: all phases follow one schedule, each from its own peak."""
    return learning_rate(plan, samples) * (plan.phase_lr.get(phase, plan.peak_lr) / plan.peak_lr)


def _peak(optimizer: Optimizer, batch: int) -> float:
    """What the batch size makes of the learning rate: Goyal et al. 2017 ("linear"), Krizhevsky 2014 ("sqrt")."""
    ratio = batch / optimizer.lr_batch
    return optimizer.lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[optimizer.lr_scaling]


def _batch_problems(batch: int, micro: int, world: int) -> list[str]:
    unit = world * micro
    if batch % unit == 0:
        return []
    below, above = batch // unit * unit, (batch // unit + 1) * unit
    remedies = [f"run.global_batch = {n}" for n in (below, above) if n]
    if batch % world == 0:
        nearest = min(
            (d for d in range(1, batch // world + 1) if batch // world % d == 0), key=lambda d: abs(d - micro)
        )
        remedies.append(f"engine.micro_batch = {nearest}")
    if batch % micro == 0:
        remedies.append(f"{max(w for w in range(1, world) if batch % (w * micro) == 0)} ranks")
    return [
        f"run.global_batch: {batch} cannot be shared out to {world} rank(s) in micro-batches of {micro} "
        f"(engine.micro_batch); near by that would be {', or '.join(remedies)}"
    ]


def _epoch_problems(config: RunConfig, samples: int) -> list[str]:
    batch = config.run.global_batch
    if samples == 0:
        return ["data.train: there are no samples"]
    if samples < batch and config.data.tail == "drop":
        return [
            f"run.global_batch: an epoch has {samples} samples, fewer than one batch of {batch}; "
            'take a smaller batch, or data.tail = "endless"'
        ]
    return []
