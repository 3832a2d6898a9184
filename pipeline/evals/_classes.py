"""Classes of different data sets are the same where their names are, whatever their numbers."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from pipeline.core.classes import class_name
from pipeline.core.errors import DataError
from pipeline.core.evaluation import Features

SHOWN = 5
"""Names in a message."""


def in_classes_of(
    test: Features, known: tuple[str, ...], stream: str, whose: str, shown: Tensor | None = None
) -> Features:
    """``test`` with its labels as numbers of the ``known`` classes.

    Args:
        test: features with labels.
        known: names of the classes that are told apart.
        stream: where ``test`` comes from, for the message.
        whose: the known classes are, for the message: "stream 'train'".
        shown: labels of all samples from which the classes are learnt; left out: they are known otherwise.

    Raises:
        DataError: a sample is of a class that is not among them, or of which there is no sample to learn from.
    """
    label = renumbered(test.label, test.classes, known, f"stream {stream!r}", whose)
    if shown is not None and (never := sorted(set(label.unique().tolist()) - set(shown.unique().tolist()))):
        names = _names([known[number] if number < len(known) else str(number) for number in never])
        raise DataError(
            f"stream {stream!r} has samples of {names}, of which {whose} has none, so that they can only be missed; "
            "measure on data of the classes that there is something to learn of"
        )
    return Features(test.x, {**test.fields, "label": label}, known)


def renumbered(label: Tensor, own: tuple[str, ...], known: tuple[str, ...], what: str, whose: str) -> Tensor:
    """Labels int64[N] of ``own`` classes as numbers of ``known`` ones, by name; ``what`` and ``whose`` name the two.

    Raises:
        DataError: a label's class is not among the known ones, or a name stands for two classes.
    """
    own, known = (tuple(map(class_name, names)) for names in (own, known))
    if own == known:
        return label
    occurring = [own[number] for number in label.unique().tolist()]
    strangers = sorted(set(occurring) - set(known))
    if strangers:
        unused = sorted(set(known) - set(own))
        raise DataError(
            f"{what} has samples of {_names(strangers)}, which {whose} does not know"
            + (f"; {whose} knows {_names(unused)} instead" if unused else "")
            + "; measure on data of the same classes"
        )
    doubled = [name for names in (own, known) for name, times in Counter(names).items() if times > 1]
    if doubled:
        raise DataError(
            f"the classes of {what} and of {whose} are not the same list, and cannot be matched by name, since "
            f"{doubled[0]!r} is the name of two; give both data sets the same list of classes"
        )
    number = {name: i for i, name in enumerate(known)}
    return torch.tensor([number.get(name, -1) for name in own], dtype=torch.int64)[label]


def _names(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"class{'es' if len(names) > 1 else ''} {', '.join(map(repr, names[:SHOWN]))}{more}"
