"""The teachers of an objective by name: each computes, or its outputs come with the batch.

Shape letters: B samples, C channels, H, W height and width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, DataFacts, Origin
from pipeline.nn.teacher import Seen, StoredTeacher, Teacher, TeacherConfig


class Teachers(nn.ModuleDict):
    """All of them.

    Args:
        configs: by name.
        facts: of the data, with what is stored.
        classes: that each is to answer with; 0: no logits are wanted.

    Raises:
        ConfigError: timm cannot build one, or its outputs are not stored as they are wanted.
    """

    def __init__(self, configs: Mapping[str, TeacherConfig], facts: DataFacts, classes: Mapping[str, int]) -> None:
        super().__init__()
        self._configs = configs
        for name, config in configs.items():
            try:
                if config.stored is None:
                    with torch.random.fork_rng(devices=[]):  # the student's weights are the same with stored outputs
                        self[name] = Teacher(config, facts.image_size, classes[name])
                else:
                    self[name] = StoredTeacher(config, facts.image_size, classes[name], facts.stored)
            except ConfigError as error:
                raise ConfigError(f"objective.teachers.{name}: {error}") from error

    def named(self, name: str) -> Teacher | StoredTeacher:
        """One of them."""
        teacher = self[name]
        assert isinstance(teacher, Teacher | StoredTeacher)
        return teacher

    @property
    def needs(self) -> dict[str, str]:
        """Fields of the batch that hold outputs."""
        stored = [teacher for teacher in self.values() if isinstance(teacher, StoredTeacher)]
        return {field: spec for teacher in stored for field, spec in teacher.needs.items()}

    def ask(self, batch: Batch, pixels: Tensor, blocks: Mapping[str, Collection[str]]) -> dict[str, Seen]:
        """What each makes of the student's crops, or has made of them.

        Args:
            batch: with what is stored.
            pixels: float32[B,C,H,W] from 0 to 1.
            blocks: names of those that are read of each.
        """
        found: dict[str, Seen] = {}
        for name in self:
            teacher = self.named(name)
            stored = isinstance(teacher, StoredTeacher)
            found[name] = teacher(batch) if stored else teacher(pixels, blocks=blocks[name])
        return found

    def origins(self, classes: tuple[str, ...]) -> dict[str, Origin]:
        """Where each comes from, as :meth:`Objective.frozen` tells it.

        Args:
            classes: names of the data's classes, in the order of the labels; empty: there are none to be held.
        """
        found: dict[str, Origin] = {}
        for name, config in self._configs.items():
            teacher = self[name]
            if isinstance(teacher, StoredTeacher):
                found[name] = Origin(config.weights, teacher.told["sha256"], stored=True)
            else:  # taken out after training, it is still one of those that came from a file
                found[name] = Origin(config.weights, config.sha256, partial(self._fill, name, classes))
        return found

    def _fill(self, name: str, classes: tuple[str, ...], path: str) -> None:
        teacher = self[name]
        assert isinstance(teacher, Teacher)
        teacher.fill(path, classes)
