"""Training inside an evaluation: through the one loop, in the ranks that evaluate, without checkpoints."""

from __future__ import annotations

from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from pipeline.config.resolve import phase_learning_rate, resolve
from pipeline.config.schema import Component, Data, EngineConfig, EvalData, Every, Run, RunConfig, Training
from pipeline.core.protocols import Clock, Objective
from pipeline.data.dataset import open_data
from pipeline.dist.group import Place
from pipeline.engine.loop import fit
from pipeline.engine.meter import Meter
from pipeline.engine.stopping import StopRequest
from pipeline.engine.surveys import Surveyor
from pipeline.engine.watch import Watch
from pipeline.run.build import build_engine, build_stream, build_surveys


def train_on(objective: Objective, data: EvalData | str, training: Training, place: Place, folder: Path) -> None:
    """Train ``objective`` in place.

    Args:
        objective: on every rank the same.
        data: shards, or a part of them.
        training: how long and how.
        place: of this rank.
        folder: of the evaluation; a file "stop" in it ends the training.

    Raises:
        Mistakes: the batch does not fit the data or the ranks.
        NonFiniteError: on every rank in the same step.
    """
    config = run_config(data, training, folder)
    manifest = open_data(config.data)
    plan = resolve(config, manifest.samples, place.world_size, "the training of an evaluation")
    engine = build_engine(config, objective, plan, place)
    meter, watch = Meter(place.device, place.world_size), Watch(place.device, StopRequest(folder))
    with ExitStack() as stack:
        stream = stack.enter_context(closing(build_stream(config, manifest, plan, place)))
        surveyor = Surveyor(engine, meter, watch, training.seed)
        fit(
            engine=engine,
            stream=stream,
            clock=Clock(0, 0, plan.total_samples),
            global_batch=plan.global_batch,
            seed=training.seed,
            learning_rate=partial(phase_learning_rate, plan),
            actions=build_surveys(config, manifest, plan, engine, surveyor, stack),
            meter=meter,
            watch=watch,
        )
    objective.eval()


def run_config(data: EvalData | str, training: Training, folder: Path) -> RunConfig:
    """The run that such a training is."""
    own = EvalData.model_validate(data)
    return RunConfig(
        run=Run(folder=str(folder), length=training.length, global_batch=training.global_batch, seed=training.seed),
        data=Data(
            train=own.path,
            **own.rules,
            sidecar=own.sidecar,
            fields=training.fields,
            image=training.image,
            workers=training.workers,
        ),
        objective=Component(name="evaluation"),
        optimizer=training.optimizer,
        schedule=training.schedule,
        engine=EngineConfig(name="accelerate", precision=training.precision, micro_batch=training.micro_batch),
        every=Every(),
    )
