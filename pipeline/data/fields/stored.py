"""Outputs of a teacher, computed once by `sluice prep embed`: ``NAME_features``, ``NAME_logits`` and the like, [B,D].

They are those of the very crop that stands in the batch: a sample has one row for each of its augmentations
(``data.augmentations``), and the settings of crops and captions are held against those that the teacher saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pipeline.config.schema import Strict
from pipeline.config.schema import Text as Word
from pipeline.data.field import Arrays, Column, Field, FieldSource, Sample, Unusable
from pipeline.data.fields.vector import read_npy
from pipeline.data.outputs import CLASSES, MEMBER, Layout, facts_of, hold


class Config(Strict):
    """Whose outputs."""

    sidecar: Word | None = None
    """Name of the data set of outputs in ``[data.sidecar]``; left out: the field's own."""


class Stored(Field):
    """All outputs of one teacher.

    Raises:
        ConfigError: no such sidecar, or the teacher has seen other crops than this run would.
    """

    def __init__(self, config: Config, source: FieldSource) -> None:
        super().__init__()
        sidecar = config.sidecar or source.name
        facts = facts_of(source.manifest, sidecar, source.where)
        hold(source.data, facts, source.where)
        self._layout = Layout(facts["outputs"], facts["top"])
        self._augmentations = int(facts["augmentations"])
        self._name, self._member = source.name, source.has(f"{sidecar}:{MEMBER}")
        self._classes = source.has(f"{sidecar}:{CLASSES}") if self._layout.top is not None else None
        self.needs = (self._member, *([self._classes] if self._classes else []))
        self.columns = {
            f"{source.name}_{output}": Column("float32", (width,)) for output, width in self._layout.widths.items()
        }

    def draw(self, epoch: Tensor, sample: Tensor) -> Sequence[int]:
        """The augmentation of each sample."""
        return (epoch % self._augmentations).tolist()

    def decode(self, sample: Sample, drawn: Any, arrays: Arrays, row: int) -> None:
        """See :meth:`Field.decode`."""
        member = self._member
        try:
            rows = read_npy(sample.members[member], (self._augmentations, self._layout.width))
            classes = None
            if self._classes is not None and self._layout.top is not None:
                member = self._classes
                classes = read_npy(sample.members[member], (self._augmentations, self._layout.top))[drawn]
            for output, values in self._layout.unpack(rows[drawn], classes).items():
                arrays[f"{self._name}_{output}"][row] = values
        except ValueError as error:
            raise Unusable(member, str(error)) from error
