"""The typed configuration of data: what is read, what a batch holds, how images are cropped. No torch here."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.parts import Choice
from pipeline.config.strict import Component, Folder, Fraction, Positive, PositiveFloat, Strict, Text

Name = Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")]
Prefix = Annotated[str, Field(pattern="^[a-z][a-z0-9]*$")]


class Crop(Strict):
    """One kind of random crop; what is left out is as in ``[data.image]``."""

    count: Annotated[int, Field(ge=1, le=64)] = 1
    """How many of them a sample gives."""
    size: Positive | tuple[Positive, Positive] | None = None
    scale: tuple[Fraction, Fraction] | None = None
    ratio: tuple[PositiveFloat, PositiveFloat] | None = None
    flip: bool | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Crop:
        for name, ends in (("scale", self.scale), ("ratio", self.ratio)):
            if ends and ends[0] > ends[1]:
                raise ValueError(f"{name} goes from {ends[0]} down to {ends[1]}; write the smaller one first")
        return self


class Image(Strict):
    """Geometry of images, done on the CPU by the loader's workers; colour is done on the device."""

    size: Positive | tuple[Positive, Positive] = 224
    """Pixels of the side, or (height, width)."""
    crop: Literal["random_resized", "center", "resize"] = "random_resized"
    """Random area and ratio; or short side resized then centre crop; or both sides resized."""
    crop_fraction: Fraction = 1.0
    """Of centre crops: side of the crop as a part of the resized image's; 0.875 resizes to 256 and cuts out 224."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How pixels are resized, antialiased in any case."""
    scale: tuple[Fraction, Fraction] = (0.2, 1.0)
    """Area of a random crop, as a part of the image's."""
    ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 4 / 3)
    """Width over height of a random crop."""
    flip: bool = True
    """Mirror half of the samples left to right (random crops only)."""
    views: Annotated[int, Field(ge=1, le=2)] = 1
    """Independent crops per sample: "image", and "image2"."""
    crops: tuple[Crop, ...] = ()
    """In place of ``views``: several kinds of random crops of a sample, [{count = 2}, {count = 6, size = 96}]. They are
    "image", "image2", "image3", ... in this order; the first ones have the size above."""

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def each(self) -> tuple[Image, ...]:
        """The geometry of each view, in order."""
        if not self.crops:
            return (self.model_copy(update={"views": 1}),) * self.views
        whole = self.model_copy(update={"crops": ()})
        views = [whole.model_copy(update=crop.model_dump(exclude={"count"}, exclude_none=True)) for crop in self.crops]
        return tuple(view for view, crop in zip(views, self.crops, strict=True) for _ in range(crop.count))

    @model_validator(mode="after")
    def _ordered(self) -> Image:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if low > high:
                raise ValueError(f"{name} goes from {low} down to {high}; write the smaller one first")
        if self.crop_fraction < 1 and self.crop != "center":
            raise ValueError(f"crop_fraction is for centre crops, not for crop = {self.crop!r}; remove one")
        return self

    @model_validator(mode="after")
    def _crops_fit(self) -> Image:
        if not self.crops:
            return self
        if self.crop != "random_resized":
            raise ValueError(f"crops are random, so they do not go with crop = {self.crop!r}; remove one")
        if self.views > 1:
            raise ValueError("'views' counts crops of one kind, 'crops' several kinds; remove one")
        if self.each[0].shape != self.shape:
            first, size = self.crops[0].size, json.dumps(self.size)
            raise ValueError(
                f"crops[0].size is {json.dumps(first)}, but size is {size}; the first crops have that size"
            )
        return self


class Source(Choice):
    """One of several data sets that are mixed, or a part of it. It is a path, wherever a path is wanted."""

    path: Text
    weight: PositiveFloat = 1.0
    """Its part of every global batch, in proportion to the others' weights."""
    domain: Text | None = None
    """Of its samples, where several domains meet, equal for sources of one; left out: as its manifest says, or its
    folder."""

    def __fspath__(self) -> str:
        """The path."""
        return self.path


class Captions(Strict):
    """How captions become the field "text"."""

    fields: dict[Text, PositiveFloat] = Field(default_factory=lambda: {"caption": 1.0})
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

    folder: Folder
    limit_gb: PositiveFloat
    """The longest unused shards are removed above it; each data set has a limit of its own."""


class Sidecar(Strict):
    """A data set of fields that is joined by key: captions v2, scores, a teacher's outputs. No shard is rewritten.

    Its fields are called "NAME:field" wherever members of shards are named: "teacher:npy", "captions2:caption".
    """

    path: Text
    """Folder or URL of its shards and manifest."""
    missing: Literal["refuse", "drop", "allow"] = "refuse"
    """Samples that it does not know: an error that names them; left out of the data set; or kept, without its fields
    (and replaced like bad ones where a field of the batch needs them)."""


class Beside(Choice):
    """A data set, or a part of one, whose samples stand in every batch beside those of ``data.train``.

    Its fields have its name before theirs: ``[data.beside.target]`` gives "target_image", "target_id" and
    "target_epoch". It has an order, epochs and a cursor of its own; all other settings of ``[data]`` hold for it too.
    """

    path: Text | Annotated[tuple[Source, ...], Field(min_length=1)]
    """As ``data.train``."""
    fields: Annotated[tuple[Text, ...], Field(min_length=1)] = ("image",)
    ratio: Annotated[int, Field(ge=1, le=64)] = 1
    """Its samples for each of ``data.train``'s."""
    image: Image | None = None
    """Left out: as ``data.image``."""
    sidecar: dict[Name, Sidecar] = Field(default_factory=dict[Name, Sidecar])

    @model_validator(mode="after")
    def _parts_of_one(self) -> Beside:
        _check_parts(self.path, list(self.rules), self.sidecar)
        return self


def _check_parts(path: object, rules: list[str], sidecar: dict[str, Sidecar]) -> None:
    """What is kept of several sources stands beside each path; sidecars know one data set."""
    if isinstance(path, str):
        return
    if rules:
        raise ValueError(f"{rules[0]} is of one data set; write it beside each path")
    if sidecar:
        raise ValueError("sidecar joins one data set by its keys, and there are several; name one")


class EvalData(Choice):
    """A data set as an evaluation looks at it: a whole one, or a part of it."""

    path: Text
    """Folder or URL of shards; or a folder of images, or of a data set of torchvision, of which shards are then made in
    the cache (SLUICE_CACHE, or ~/.cache/sluice)."""
    torchvision: Text | None = None
    """Name of the data set of torchvision that lies in ``path``: "CIFAR10". Nothing is downloaded."""
    split: Text | None = None
    """Of a folder with one for each split, or of a data set of torchvision: "train", "val", "test"."""
    sidecar: dict[Name, Sidecar] = Field(default_factory=dict[Name, Sidecar])
    """As ``data.sidecar`` of a run."""

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, given: object) -> object:
        return {"path": given} if isinstance(given, str) else given

    def __str__(self) -> str:
        """For people."""
        parts = [self.torchvision, self.path, self.split, self.keep and f"keep {self.keep}", self.where]
        return ", ".join(str(part) for part in (*parts, self.held_out, self.by_label) if part)

    def __hash__(self) -> int:
        """Of all settings."""
        return hash(self.model_dump_json())


class Data(Choice):
    """The training stream: a data set, or a part of it."""

    train: Text | Annotated[tuple[Source, ...], Field(min_length=1)]
    """Where the shards and their manifest.json are: a folder or URL, or some of its shards, "x/y-{000..099}.tar"; or
    several such, mixed: [{path = "a", weight = 3}, {path = "b"}]."""
    sidecar: dict[Name, Sidecar] = Field(default_factory=dict[Name, Sidecar])
    """Data sets that are joined by key."""
    fields: Annotated[tuple[Text, ...], Field(min_length=1)] = ("image",)
    """What a batch holds: "image", "label", "text", "labels", "texts", "mask", "vector", "metadata", or names that
    ``field`` gives."""
    field: dict[Name, Component] = Field(default_factory=dict[Name, Component])
    """Settings of fields that are not set elsewhere: [data.field.teacher] name = "vector", size = 768 makes a field
    "teacher" of the kind "vector"."""
    image: Image = Image()
    captions: Captions = Captions()
    beside: dict[Prefix, Beside] = Field(default_factory=dict[Prefix, Beside])
    """Further data sets, unlabelled ones of another domain for example."""
    augmentations: Positive | None = None
    """How many times a sample is cropped, and its caption chosen, anew: after so many epochs the same come again, which
    depend on its key and the seed below alone, so that a teacher's outputs can be stored. Left out: always anew."""
    augmentation_seed: Annotated[int, Field(ge=0)] = 0
    """Of these. The run's own has no part in them: runs with other seeds see the same crops."""
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

    @property
    def chosen(self) -> bool:
        """Some of the samples alone, or something joined to them: more than the manifests tell."""
        sources = () if isinstance(self.train, str) else self.train
        return bool(self.rules or self.sidecar) or any(source.rules for source in sources)

    @model_validator(mode="after")
    def _augmentations_have_a_seed(self) -> Data:
        if self.augmentation_seed and self.augmentations is None:
            raise ValueError("augmentation_seed is of augmentations that come again; set augmentations, or remove it")
        return self

    @model_validator(mode="after")
    def _names_stay_apart(self) -> Data:
        if both := sorted(set(self.beside) & set(self.fields)):
            raise ValueError(f"beside.{both[0]} has the name of a field, and its columns would; choose another name")
        return self

    @model_validator(mode="after")
    def _parts_of_one(self) -> Data:
        _check_parts(self.train, list(self.rules), self.sidecar)
        return self

    @model_validator(mode="after")
    def _settings_are_used(self) -> Data:
        wanted = {*self.fields, *(name for beside in self.beside.values() for name in beside.fields)}
        if unused := sorted(set(self.field) - wanted):
            raise ValueError(f"field.{unused[0]} sets a field that is not wanted; add {unused[0]!r} to fields")
        return self
