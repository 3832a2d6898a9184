"""The interface of fields. What stands in a batch under a name in ``data.fields`` is made by one file of ``fields/``.

A file ``fields/NAME.py`` holds a docstring, ``class Config`` (frozen) for what is set in ``[data.field.NAME]``, and one
class that subclasses :class:`Field`. Nothing is registered. Shape letters: B samples of a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, cast

import numpy as np
from torch import Tensor

from pipeline.config.schema import Component, Data
from pipeline.core import registry
from pipeline.core.components import check_component
from pipeline.core.errors import ConfigError
from pipeline.core.manifest import Manifest
from pipeline.data.decode import Stored, open_image
from pipeline.data.reader import Members
from pipeline.data.text import TextDecoder

PACKAGE = "pipeline.data.fields"
Arrays = dict[str, np.ndarray]


class Column(NamedTuple):
    """One entry of a batch, without the batch dimension."""

    dtype: str
    shape: tuple[int, ...]


class Unusable(ValueError):
    """A member that a field cannot use."""

    def __init__(self, member: str, reason: str) -> None:
        super().__init__(reason)
        self.member = member


class Sample:
    """The stored members of one sample; an image that several fields look at is opened once."""

    def __init__(self, members: Members) -> None:
        self.members = members
        self._images: dict[str, Stored] = {}

    def image(self, member: str) -> Stored:
        """An image file.

        Raises:
            ValueError: not a readable image.
        """
        if member not in self._images:
            self._images[member] = open_image(self.members[member])
        return self._images[member]


@dataclass(frozen=True)
class FieldSource:
    """What a field is built from."""

    name: str
    """Its name in ``data.fields``."""
    manifest: Manifest
    data: Data
    seed: int
    """Of the run."""
    tokenizer: Callable[[], bytes]
    """Reads the file of the tokenizer, where a field needs one."""

    def has(self, member: str, where: str = "data.fields") -> str:
        """``member``, which samples of the data set may have.

        Raises:
            ConfigError: the data set promises no such member.
        """
        if member not in self.manifest.fields:
            known = ", ".join(self.manifest.fields) or "none"
            raise ConfigError(f"{where}: {self.manifest.root} has no field {member!r}, only {known}")
        return member

    @property
    def where(self) -> str:
        """Where its settings stand, for messages."""
        return f"data.field.{self.name}"


class Field(ABC):
    """One kind of field, built as ``Class(config, source)``. The same in all processes: it is pickled.

    Raises:
        ConfigError: settings that do not fit each other or the data set.
    """

    columns: Mapping[str, Column]
    """What it writes for each sample."""
    needs: Sequence[str]
    """Members of the shards that each sample must have."""
    takes: Sequence[str] = ()
    """Members that are read where a sample has them; one that has none of a field's members is bad."""
    kinds: Sequence[str] = ()
    """Of :attr:`events`."""
    text: TextDecoder | None = None
    """What makes tokens of its texts."""

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()
        """How often something happened that is no mistake but worth knowing; whoever reads it clears it."""

    def draw(self, epoch: Tensor, sample: Tensor) -> Sequence[Any]:
        """What chance decides for each of B samples, as a function of seed, epoch and id alone.

        Args:
            epoch: int64[B].
            sample: int64[B].
        """
        return [None] * len(sample)

    @abstractmethod
    def decode(self, sample: Sample, drawn: Any, arrays: Arrays, row: int) -> None:
        """Write all columns of one sample into a row of arrays, [B, *column.shape] each.

        Raises:
            ValueError: the sample cannot be used; :class:`Unusable` where that is not the member of the field's name.
        """


@cache
def kinds() -> tuple[str, ...]:
    """All kinds of fields."""
    return tuple(registry.names(PACKAGE))


def make_fields(manifest: Manifest, data: Data, seed: int, tokenizer: Callable[[], bytes]) -> dict[str, Field]:
    """The fields of a batch by name.

    Args:
        manifest: the data set.
        data: names, kinds and settings of the fields.
        seed: of the run.
        tokenizer: see :class:`FieldSource`.

    Raises:
        ConfigError: an unknown field, settings that it does not have, or one that the data set cannot serve; two fields
            that write the same column.
    """
    fields: dict[str, Field] = {}
    owner = {"id": "every batch", "epoch": "every batch"}
    for name in data.fields:
        component = data.field.get(name) or Component(name=name)
        if component.name not in kinds():
            where = f"data.field.{name}: unknown kind of field" if name in data.field else "data.fields: unknown field"
            raise ConfigError(f"{where} {component.name!r}; {registry.suggest(component.name, list(kinds()))}")
        settings = check_component(PACKAGE, component, "data", ("data", "field", name))
        make = cast("Callable[..., Field]", registry.component(PACKAGE, component.name, Field))
        fields[name] = make(settings, FieldSource(name, manifest, data, seed, tokenizer))
        for column in fields[name].columns:
            if column in owner:
                raise ConfigError(
                    f"data.fields: {name!r} and {owner[column]} both have a column {column!r}; rename one"
                )
            owner[column] = repr(name)
    return fields
