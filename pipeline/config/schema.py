"""The typed configuration of a run; that of a suite is beside it. Unknown keys are errors. No torch here.

Settings of components (``[objective]``, ``[[evals]]``) are read in two phases: here their ``name`` and the rest as
plain values, later, in the job's own environment, by the component's own ``Config``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from pipeline.config.data import Beside, Cache, Captions, Crop, Data, EvalData, Image, Sidecar, Source
from pipeline.config.durations import Duration
from pipeline.config.parts import ByLabel, HeldOut
from pipeline.config.strict import (
    Component,
    Folder,
    Fraction,
    Positive,
    PositiveFloat,
    Precision,
    Strict,
    Text,
    Weights,
    Width,
)
from pipeline.config.suite import Average, EvalTask, SuiteConfig
from pipeline.core import registry

__all__ = [
    "FOREIGN", "Average", "Beside", "ByLabel", "Cache", "Captions", "Component", "Crop", "Data", "EmaConfig",
    "EngineConfig", "EvalData", "EvalTask", "Every", "Fraction", "Group", "HeldOut", "Image", "Online", "Optimizer",
    "Phase", "Positive", "PositiveFloat", "Precision",
    "Record", "Run", "RunConfig", "Sidecar", "Source", "Start", "Strict", "SuiteConfig", "Text", "Weights", "Width",
    "without_silence",
]  # fmt: skip


class Group(Strict):
    """Parameters that are trained in another way than the rest. Of groups that hold one, the longest prefix decides."""

    prefix: Text
    """Whole parts of the parameters' names: "encoder" holds "encoder.head.weight", and not "encoder2.weight"."""
    lr: PositiveFloat = 1.0
    """Of the learning rate, a part or a multiple; beside ``layer_decay``."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """In place of the optimizer's, for what is decayed at all; left out: as there."""
    frozen: bool = False
    """Not trained at all. Modules whose parameters are all frozen are in eval mode meanwhile: no dropout, no statistics
    of batch norm."""
    frozen_from: Duration | None = None
    """Not trained from here on: no update, no state of the optimizer, no part in the gradient's norm."""
    frozen_until: Duration | None = None
    """Not trained up to here."""

    @model_validator(mode="after")
    def _always_or_for_a_time(self) -> Group:
        if self.frozen and (self.frozen_from or self.frozen_until):
            raise ValueError("'frozen' is for the whole run; remove it, or frozen_from and frozen_until")
        return self


FOREIGN = {"adamw": {"momentum"}, "sgd": {"betas", "eps"}, "lars": {"betas", "eps"}}
"""Settings that an optimizer does not have."""


class Optimizer(Strict):
    """The optimizer and its parameter groups."""

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    lr: PositiveFloat
    """Peak learning rate, before scaling."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """Multiply ``lr`` by global_batch/lr_batch ("linear") or its square root ("sqrt")."""
    lr_batch: Positive = 256
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Of adamw."""
    eps: PositiveFloat = 1e-8
    """Of adamw."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of sgd and lars."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Of what ``decay`` names."""
    weight_decay_end: Annotated[float, Field(ge=0)] | None = None
    """What ``weight_decay`` has become at the end of the run, on half a cosine from its beginning (DINO: 0.04 to 0.4);
    left out: it stays. Groups with a decay of their own keep it."""
    decay: Literal["matrices", "all"] = "matrices"
    """"matrices": not norms, biases and what the objective excludes; "all": everything that is trained, as code has it
    that hands all parameters to torch's SGD or AdamW (MoCo's)."""
    lr_vectors: PositiveFloat = 1.0
    """Of the learning rate, for parameters of at most one dimension, norms and biases (Barlow Twins: 0.024)."""
    layer_decay: Fraction = 1.0
    """Learning rate of each layer as a part of the next one's; 1: all the same."""
    clip: PositiveFloat | None = None
    """Largest norm of the gradient; left out: no clipping."""
    groups: tuple[Group, ...] = ()

    @model_validator(mode="after")
    def _own_settings(self) -> Optimizer:
        if given := sorted(FOREIGN[self.name] & self.model_fields_set):
            raise ValueError(f"{self.name} has no {' or '.join(given)}; remove it, or choose another optimizer")
        prefixes = [group.prefix for group in self.groups]
        if twice := sorted({prefix for prefix in prefixes if prefixes.count(prefix) > 1}):
            raise ValueError(
                f"groups: {', '.join(map(repr, twice))} stands twice; write what holds for it in one group"
            )
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, default: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is dumped loads again: settings of other optimizers are left out."""
        return {name: value for name, value in default(self).items() if name not in FOREIGN[self.name]}


class Phase(Strict):
    """One of the updates that make a step of an objective with several: ``[phases.critic]``."""

    updates: Positive = 1
    """In each step, all on the step's batch."""
    optimizer: Optimizer | None = None
    """Left out: as [optimizer]. The schedule is that of all phases."""


class EngineConfig(Strict):
    """How the model is trained and spread over ranks."""

    name: Literal["deepspeed", "accelerate"]
    zero: Literal[0, 1, 2, 3] = 1
    """DeepSpeed's ZeRO stage."""
    precision: Precision = "bf16"
    micro_batch: Positive
    """Samples per rank and forward; accumulation follows from the global batch."""
    timeout_minutes: PositiveFloat = 10.0
    """A collective that takes longer ends the job."""
    hang_minutes: PositiveFloat = 5.0
    """A step that takes longer, and ten times longer than the median, ends the job after the stacks of all ranks were
    written; the start, saving and the like have six times as long."""
    slow_percent: PositiveFloat = 40.0
    """A rank whose own time for a step, without what it waits for others, stays longer than the median of the other
    ranks' by so much is named."""
    slow_minutes: PositiveFloat = 4.0
    """After so many at the latest: it was slow in three windows in a row, of a quarter of this each."""

    @model_validator(mode="after")
    def _zero_is_deepspeed(self) -> EngineConfig:
        if self.name == "accelerate" and "zero" in self.model_fields_set:
            raise ValueError("'zero' belongs to the deepspeed engine; remove it or set name = \"deepspeed\"")
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, default: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is dumped loads again: an accelerate engine has no 'zero'."""
        table = default(self)
        if self.name == "accelerate":
            del table["zero"]
        return table


class EmaConfig(Strict):
    """Moving averages of the weights, in fp32 from the master weights, saved with every checkpoint."""

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.9999
    """What is kept per update, after a warm-up of (1 + n) / (10 + n) at update n."""
    power: tuple[Width, ...] = ()
    """Relative widths of further, power-function averages, from which averages of any width can be made later."""


class Every(Strict):
    """How often things happen; "0ba" is never."""

    log: Duration = Duration(10.0, "ba")
    checkpoint: Duration = Duration(1000.0, "ba")
    showcase: Duration = Duration(25.0, "%")


class Run(Strict):
    """The run as a whole."""

    folder: Folder
    """Run folder: checkpoints, metrics, report."""
    length: Duration
    global_batch: Positive
    """Samples per update, over all ranks."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    keep: Positive = 3
    """Newest whole checkpoints that are kept."""
    keep_every: Duration = Duration(0.0, "ba")
    """Of the older ones those are kept that lie so far apart, for evaluation and averages; 0ba: none."""
    keep_optimizer: bool = False
    """With the optimizer's state, most of their bytes, so that a run can go back to them."""
    change: tuple[Text, ...] = ()
    """Settings ("objective.mask_ratio") that may differ from what the run was trained with so far, although they make
    another experiment of it; see pipeline/config/changes.py."""

    @model_validator(mode="after")
    def _has_length(self) -> Run:
        if self.length.unit == "%" or self.length.value == 0:
            raise ValueError(f"length cannot be '{self.length}'; write epochs, updates or samples, like '90ep'")
        return self


def without_silence(table: Any) -> Any:
    """Leave out what said nothing: files of earlier runs hold settings of one schedule under the name of another."""
    if not isinstance(table, dict):
        return table
    given: dict[str, Any] = dict(cast("dict[str, Any]", table))
    given.setdefault("name", "cosine")
    key, nothing = ("cooldown", "0%") if given["name"] == "cosine" else ("final", 0.0)
    if given.get(key) == nothing:
        del given[key]
    return given


class Start(Strict):
    """Weights that a run begins with, in place of those that are drawn."""

    model_config = ConfigDict(serialize_by_alias=True)

    source: Text = Field(alias="from")
    """A run, one of its checkpoints, a file of weights, or "timm:NAME" (stored on this machine), "timm:NAME=FILE"."""
    weights: Weights = "model"
    """Of a checkpoint: see [ema]."""
    parts: dict[Text, str] = Field(default={})
    """What names begin with here, to what they begin with there; left out: the same, or where the backbone is there."""
    skip: tuple[Text, ...] = ()
    """What begins so here stays as it is drawn: "head."."""


class Record(Strict):
    """What a run keeps beside its metrics."""

    losses: Literal["never", "every epoch"] = "never"
    """What each sample lost, by its id: see `sluice losses`."""
    loggers: tuple[Text, ...] = ("tensorboard",)
    """Programs that show the curves, files of pipeline/record/loggers; all work without network."""

    @model_validator(mode="after")
    def _loggers_exist(self) -> Record:
        known = registry.names("pipeline.record.loggers")
        for name in self.loggers:
            if name not in known:
                raise ValueError(f"loggers: unknown logger {name!r}; {registry.suggest(name, known)}")
        if len(set(self.loggers)) < len(self.loggers):
            raise ValueError("loggers: one of them stands twice")
        return self


class Online(Strict):
    """A suite that is run on the run's own weights while it trains. It changes nothing of the run."""

    suite: Text
    """File of the suite."""
    every: Duration = Duration(1.0, "ep")
    """From one evaluation to the next; the first is before the first update, the last after the last one."""
    weights: Literal["model", "ema"] | None = None
    """Left out: the moving average, where [ema] keeps one."""
    best: Text | None = None
    """A metric of the suite, "knn/top1_k20": the checkpoint with its best value stays."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Evaluations without a new best value after which the run ends; 0: it does not."""

    @model_validator(mode="after")
    def _patience_needs_best(self) -> Online:
        if self.patience and self.best is None:
            raise ValueError("'patience' needs 'best', the metric that is to become better")
        if self.every.value == 0:
            raise ValueError("'every' is zero; leave [online] out")
        return self


class RunConfig(Strict):
    """One training run."""

    run: Run
    data: Data
    objective: Component
    optimizer: Optimizer
    phases: dict[Text, Phase] = Field(default={})
    """Of an objective that has several; those left out are as [optimizer] says, one update in each step."""
    schedule: Annotated[Component, BeforeValidator(without_silence)] = Component(name="cosine")
    """Of the learning rate: see pipeline/config/schedules."""
    engine: EngineConfig
    ema: EmaConfig | None = None
    """Left out: none."""
    start: Start | None = None
    """Left out: weights are drawn, or what the objective's own settings say."""
    every: Every = Every()
    online: Online | None = None
    """Left out: none."""
    record: Record = Record()

    def optimizers(self) -> dict[str, Optimizer]:
        """All that are configured, by the name of their table: "optimizer", "phases.critic.optimizer"."""
        own = {f"phases.{name}.optimizer": p.optimizer for name, p in self.phases.items() if p.optimizer is not None}
        return {"optimizer": self.optimizer, **own}

    @model_validator(mode="after")
    def _lars_needs_whole_layers(self) -> RunConfig:
        names = {optimizer.name for optimizer in self.optimizers().values()}
        if "lars" in names and self.engine.name == "deepspeed" and self.engine.zero > 0:
            raise ValueError(
                "lars scales each layer by its norms, which ZeRO cuts to pieces; set engine.zero = 0, "
                'or engine.name = "accelerate"'
            )
        return self

    @model_validator(mode="after")
    def _lanes_divide(self) -> RunConfig:
        if self.data.lanes and self.run.global_batch % self.data.lanes:
            raise ValueError(
                f"data.lanes is {self.data.lanes}, which does not divide run.global_batch = {self.run.global_batch}"
            )
        return self


class Training(Strict):
    """A training inside an evaluation, as a part of that one's settings."""

    length: Duration
    global_batch: Positive = 256
    """Samples per update, over all ranks."""
    micro_batch: Positive = 256
    """Samples per rank and forward."""
    optimizer: Optimizer
    schedule: Component = Component(name="cosine")
    precision: Precision = "fp32"
    fields: Annotated[tuple[Text, ...], Field(min_length=1)] = ("image", "label")
    image: Image = Image()
    workers: Annotated[int, Field(ge=0)] = 2
    """Loader processes per rank; 0 reads in the rank itself."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
