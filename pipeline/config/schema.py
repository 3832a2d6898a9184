"""The typed configuration of a run and of an evaluation suite. Unknown keys are errors. No torch here.

Settings of components (``[objective]``, ``[[evals]]``) are read in two phases: here their ``name`` and the rest as
plain values, later, in the job's own environment, by the component's own ``Config``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from pipeline.config.durations import Duration


class Strict(BaseModel):
    """Base of all configuration: frozen, unknown keys forbidden, numbers finite."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",  # a component's own settings may be infinite
    )


Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Width = Annotated[float, Field(gt=0, lt=0.28)]
"""Of a power-function average, as a part of the run so far."""
Weights = Width | Literal["model", "ema"]
"""Which weights of a checkpoint: as trained, their moving average, or their power-function average of a width."""


class Component(BaseModel):
    """A component by name with settings of its own: ``name = "mae"`` and whatever its ``Config`` allows."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: Text
    """File name of the component, without .py."""

    @property
    def settings(self) -> dict[str, Any]:
        """All but the name, for the component's ``Config``."""
        return dict(self.model_extra or {})


class Image(Strict):
    """Geometry of images, done on the CPU by the loader's workers; colour is done on the device."""

    size: Positive | tuple[Positive, Positive] = 224
    """Pixels of the side, or (height, width)."""
    crop: Literal["random_resized", "center", "resize"] = "random_resized"
    """Random area and ratio; or short side resized then centre crop; or both sides resized."""
    crop_fraction: Fraction = 1.0
    """Of centre crops: side of the crop as a part of the resized image's; 0.875 resizes to 256 and cuts out 224."""
    scale: tuple[Fraction, Fraction] = (0.2, 1.0)
    """Area of a random crop, as a part of the image's."""
    ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 4 / 3)
    """Width over height of a random crop."""
    flip: bool = True
    """Mirror half of the samples left to right (random crops only)."""
    views: Annotated[int, Field(ge=1, le=2)] = 1
    """Independent crops per sample: "image", and "image2"."""

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @model_validator(mode="after")
    def _ordered(self) -> Image:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if low > high:
                raise ValueError(f"{name} goes from {low} down to {high}; write the smaller one first")
        if self.crop_fraction < 1 and self.crop != "center":
            raise ValueError(f"crop_fraction is for centre crops, not for crop = {self.crop!r}; remove one")
        return self


class Source(Strict):
    """One of several data sets that are mixed. It is a path, wherever a path is wanted."""

    path: Text
    weight: PositiveFloat = 1.0
    """Its part of every global batch, in proportion to the others' weights."""

    def __fspath__(self) -> str:
        """The path."""
        return self.path


class Captions(Strict):
    """How captions become the field "text"."""

    fields: dict[Text, PositiveFloat] = {"caption": 1.0}
    """Fields of the manifest and their weights: one of those that a sample has is chosen for it in each epoch."""
    tokenizer: Text | None = None
    """A tokenizer.json; "clip": CLIP's vocabulary, of an installed open_clip_torch (with pad = "!", as CLIP has it);
    left out: the one that was trained with the shards."""
    length: Annotated[int, Field(ge=3)] = 77
    """Tokens of a text, its start and end included; longer texts are cut before their end, shorter ones padded."""
    start: str = "<start_of_text>"
    """Token before each text; "": none."""
    end: Text = "<end_of_text>"
    """Token after each text."""
    pad: Text = "<pad>"
    """Token that fills the rest."""


class Cache(Strict):
    """Where whole shards of a remote data set are kept on a node."""

    folder: Text
    limit_gb: PositiveFloat
    """The longest unused shards are removed above it; each data set has a limit of its own."""


class Beside(Strict):
    """A data set whose samples stand in every batch beside those of ``data.train``, as many of them.

    Its fields have its name before theirs: ``[data.beside.target]`` gives "target_image", "target_id" and
    "target_epoch". It has an order, epochs and a cursor of its own; all other settings of ``[data]`` hold for it too.
    """

    path: Text | Annotated[tuple[Source, ...], Field(min_length=1)]
    """As ``data.train``."""
    fields: Annotated[tuple[Text, ...], Field(min_length=1)] = ("image",)
    image: Image | None = None
    """Left out: as ``data.image``."""


class Data(Strict):
    """The training stream."""

    train: Text | Annotated[tuple[Source, ...], Field(min_length=1)]
    """Where the shards and their manifest.json are: a folder or URL, or some of its shards, "x/y-{000..099}.tar"; or
    several such, mixed: [{path = "a", weight = 3}, {path = "b"}]."""
    fields: Annotated[tuple[Text, ...], Field(min_length=1)] = ("image",)
    """What a batch holds: "image", "label", "text"."""
    image: Image = Image()
    captions: Captions = Captions()
    beside: dict[Annotated[str, Field(pattern="^[a-z][a-z0-9]*$")], Beside] = {}
    """Further data sets, unlabelled ones of another domain for example."""
    decode: Literal["loader", "device"] = "loader"
    """Where images are decoded: by the loader's processes, or JPEGs on the GPU."""
    cache: Cache | None = None
    """For shards at URLs; left out: they are read by ranges."""
    read_mb: Positive = 64
    """Megabytes of stored samples that a worker holds at a time."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Loader processes per rank; 0 reads in the rank itself."""
    lanes: Positive | None = None
    """Lanes that the epoch is cut into; must divide the global batch. Left out: chosen from shards and batch."""
    window: Positive = 4
    """Shards inside a lane that are shuffled together."""
    tail: Literal["drop", "endless"] = "drop"
    """The last (samples mod global batch) of an epoch: dropped (others each epoch), or joined to the next epoch."""
    max_bad: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Part of the samples that may be unreadable (and replaced, and noted in the ledger) before the run stops."""


class Group(Strict):
    """Parameters that are trained in another way than the rest. Of groups that hold one, the longest prefix decides."""

    prefix: Text
    """Whole parts of the parameters' names: "encoder" holds "encoder.head.weight", and not "encoder2.weight"."""
    lr: PositiveFloat = 1.0
    """Of the learning rate, a part or a multiple; beside ``layer_decay``."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """In place of the optimizer's, for what is decayed at all; left out: as there."""
    frozen: bool = False
    """Not trained at all. Statistics of batch norm go on."""
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
    """Not applied to norms, biases and what the objective excludes."""
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


class EngineConfig(Strict):
    """How the model is trained and spread over ranks."""

    name: Literal["deepspeed", "accelerate"]
    zero: Literal[0, 1, 2, 3] = 1
    """DeepSpeed's ZeRO stage."""
    precision: Literal["bf16", "fp32"] = "bf16"
    micro_batch: Positive
    """Samples per rank and forward; accumulation follows from the global batch."""
    timeout_minutes: PositiveFloat = 10.0
    """A collective that takes longer ends the job."""
    hang_minutes: PositiveFloat = 5.0
    """A step that takes longer, and ten times longer than the median, ends the job after the stacks of all ranks were
    written; the start, saving and the like have six times as long."""

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

    folder: Text
    """Run folder: checkpoints, metrics, report."""
    length: Duration
    global_batch: Positive
    """Samples per update, over all ranks."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    keep: Positive = 3
    """Newest whole checkpoints that are kept."""
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


class RunConfig(Strict):
    """One training run."""

    run: Run
    data: Data
    objective: Component
    optimizer: Optimizer
    schedule: Annotated[Component, BeforeValidator(without_silence)] = Component(name="cosine")
    """Of the learning rate: see pipeline/config/schedules."""
    engine: EngineConfig
    ema: EmaConfig | None = None
    """Left out: none."""
    every: Every = Every()

    @model_validator(mode="after")
    def _lars_needs_whole_layers(self) -> RunConfig:
        if self.optimizer.name == "lars" and self.engine.name == "deepspeed" and self.engine.zero > 0:
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
    precision: Literal["bf16", "fp32"] = "fp32"
    fields: Annotated[tuple[Text, ...], Field(min_length=1)] = ("image", "label")
    image: Image = Image()
    workers: Annotated[int, Field(ge=0)] = 2
    """Loader processes per rank; 0 reads in the rank itself."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class SuiteConfig(Strict):
    """A suite of evaluations, run on any checkpoint whose encoders fit."""

    streams: Annotated[dict[str, Text], Field(min_length=1)]
    """Name to data set folder, e.g. {train = "shards/train", val = "shards/val"}."""
    fields: tuple[str, ...] = ("image", "label")
    """Fields of the manifests that a batch holds."""
    image: Image | None = None
    """Geometry for evaluation; left out: centre crop at the run's training size."""
    batch: Positive = 256
    workers: Annotated[int, Field(ge=0)] = 2
    weights: Weights = "model"
    """See [ema]."""
    judge: Text | None = None
    """Folder of another run, whose newest checkpoint judges images that this one makes."""
    evals: tuple[Component, ...] = Field(min_length=1)
