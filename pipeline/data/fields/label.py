"""The class of a sample: ``label``, int64[B], from the .cls member."""

from __future__ import annotations

from typing import Any

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError
from pipeline.core.manifest import Joined
from pipeline.data.field import Arrays, Column, Field, FieldSource, Sample
from pipeline.data.labels import decode_label


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
