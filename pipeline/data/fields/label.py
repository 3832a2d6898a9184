"""The class of a sample: ``label``, int64[B], from the .cls member."""

from __future__ import annotations

from codecs import BOM_UTF8
from typing import Any

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError
from pipeline.core.manifest import Joined
from pipeline.data.field import Arrays, Column, Field, FieldSource, Sample


class Config(Strict):
    """There is nothing to set."""


class Label(Field):
    """A class number written in decimal.

    Raises:
        ConfigError: the data set has no labels, or those of several sources are numbers of different classes.
    """

    def __init__(self, config: Config, source: FieldSource) -> None:
        super().__init__()
        manifest = source.manifest
        self.needs = (source.has("label"),)
        if isinstance(manifest, Joined) and len({p.classes for p in manifest.parts}) > 1:
            raise ConfigError("data.fields: labels of sources with different classes cannot be mixed; remove 'label'")
        self.columns = {source.name: Column("int64", ())}
        self._name = source.name
        self._classes = len(manifest.classes)

    def decode(self, sample: Sample, drawn: Any, arrays: Arrays, row: int) -> None:
        """See :meth:`Field.decode`."""
        arrays[self._name][row] = decode_label(sample.members["label"], self._classes)


def decode_label(data: memoryview, classes: int) -> int:
    """A class number written in decimal.

    Raises:
        ValueError: not a number, or not of one of ``classes`` (0: any that int64 holds).
    """
    text = bytes(data).removeprefix(BOM_UTF8).strip()
    if not text.isdigit():
        raise ValueError(f"label {text[:40]!r} is not a number")
    label = int(text)
    if classes and label >= classes:
        raise ValueError(f"label {label} is not one of the {classes} classes")
    if label >= 1 << 63:
        raise ValueError(f"label {label} is too large")
    return label
