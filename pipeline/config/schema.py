"""The typed configuration of a run and of an evaluation suite. Unknown keys are errors. No torch here.

Settings of components (``[objective]``, ``[[evals]]``) are read in two phases: here their ``name`` and the rest as
plain values, later, in the job's own environment, by the component's own ``Config``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.config.durations import Duration


class Strict(BaseModel):
    """Base of all configuration: frozen, unknown keys forbidden, no silent conversions of text to numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, arbitrary_types_allowed=True)


class Component(BaseModel):
    """A component by name with settings of its own: ``name = "mae"`` and whatever its ``Config`` allows."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: Annotated[str, Field(description="file name of the component, without .py")]

    @property
    def settings(self) -> dict[str, Any]:
        """All but the name, for the component's ``Config``."""
        return dict(self.model_extra or {})


class Image(Strict):
    """Geometry of images, done on the CPU by the loader's workers; colour is done on the device."""

    size: int | tuple[int, int] = 224
    """Pixels of the side, or (height, width)."""
    crop: Literal["random_resized", "center", "resize"] = "random_resized"
    """Random area and ratio; or short side resized then centre crop; or both sides resized."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Area of a random crop, as a part of the image's."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """Width over height of a random crop."""
    flip: bool = True
    """Mirror half of the samples left to right (random crops only)."""
    views: Annotated[int, Field(ge=1, le=2)] = 1
    """Independent crops per sample: "image", and "image2"."""

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size


class Data(Strict):
    """The training stream."""

    train: str
    """Folder that holds the shards and their manifest.json."""
    fields: tuple[str, ...] = ("image",)
    """Fields of the manifest that a batch holds: "image", "label"."""
    image: Image = Image()
    workers: Annotated[int, Field(ge=0)] = 2
    """Loader processes per rank; 0 reads in the rank itself."""
    lanes: Annotated[int, Field(ge=1)] | None = None
    """Lanes that the epoch is cut into; must divide the global batch. Left out: chosen from shards and batch."""
    window: Annotated[int, Field(ge=1)] = 4
    """Shards inside a lane that are shuffled together."""
    tail: Literal["drop", "endless"] = "drop"
    """The last (samples mod global batch) of an epoch: dropped (others each epoch), or joined to the next epoch."""
    max_bad: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Part of the samples that may be unreadable (and replaced, and noted in the ledger) before the run stops."""


class Optimizer(Strict):
    """The optimizer and its parameter groups."""

    name: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate, before scaling."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """Multiply ``lr`` by global_batch/lr_batch ("linear") or its square root ("sqrt")."""
    lr_batch: Annotated[int, Field(ge=1)] = 256
    betas: tuple[float, float] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Not applied to norms, biases and what the objective excludes."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rate of each layer as a part of the next one's; 1: all the same."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of the gradient; left out: no clipping."""


class Schedule(Strict):
    """Learning rate against samples, as a part of the peak."""

    name: Literal["cosine", "constant", "inverse_sqrt"] = "cosine"
    warmup: Duration = Duration(5.0, "%")
    """Linear from zero."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Cosine's end, as a part of the peak."""
    cooldown: Duration = Duration(0.0, "%")
    """Linear to zero over the end of the run (constant and inverse_sqrt)."""


class EngineConfig(Strict):
    """How the model is trained and spread over ranks."""

    name: Literal["deepspeed", "accelerate"]
    zero: Literal[0, 1, 2, 3] = 1
    """DeepSpeed's ZeRO stage."""
    precision: Literal["bf16", "fp32"] = "bf16"
    micro_batch: Annotated[int, Field(ge=1)]
    """Samples per rank and forward; accumulation follows from the global batch."""
    timeout_minutes: Annotated[float, Field(gt=0)] = 10.0
    """A collective that takes longer ends the job."""

    @model_validator(mode="after")
    def _zero_is_deepspeed(self) -> EngineConfig:
        if self.name == "accelerate" and "zero" in self.model_fields_set:
            raise ValueError("'zero' belongs to the deepspeed engine; remove it or set name = \"deepspeed\"")
        return self


class Every(Strict):
    """How often things happen."""

    log: Duration = Duration(10.0, "ba")
    checkpoint: Duration = Duration(1000.0, "ba")
    showcase: Duration = Duration(25.0, "%")


class Run(Strict):
    """The run as a whole."""

    folder: str
    """Run folder: checkpoints, metrics, report."""
    length: Duration
    global_batch: Annotated[int, Field(ge=1)]
    """Samples per update, over all ranks."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    keep: Annotated[int, Field(ge=1)] = 3
    """Newest checkpoints that are kept."""


class RunConfig(Strict):
    """One training run."""

    run: Run
    data: Data
    objective: Component
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    engine: EngineConfig
    every: Every = Every()


class SuiteConfig(Strict):
    """A suite of evaluations, run on any checkpoint whose encoders fit."""

    streams: dict[str, str]
    """Name to data set folder, e.g. {train = "shards/train", val = "shards/val"}."""
    image: Image | None = None
    """Geometry for evaluation; left out: centre crop at the run's training size."""
    batch: Annotated[int, Field(ge=1)] = 256
    workers: Annotated[int, Field(ge=0)] = 2
    evals: tuple[Component, ...] = Field(min_length=1)
