"""One data set of a batch."""

from __future__ import annotations

import pytest
import torch

from pipeline.core.batch import batch_of
from pipeline.core.errors import ConfigError

FIELDS = ("image", "text", "text_length", "id", "epoch", "far_image", "far_id", "far_epoch", "near_label", "near_id")
BATCH = {name: torch.tensor([number]) for number, name in enumerate(FIELDS)}


def test_each_data_set_has_plain_names_and_its_own_ids():
    assert list(batch_of(BATCH)) == ["image", "text", "text_length", "id", "epoch"]
    assert batch_of(BATCH)["id"] is BATCH["id"]
    far = batch_of(BATCH, "far")
    assert {name: int(value) for name, value in far.items()} == {"image": 5, "id": 6, "epoch": 7}
    assert list(batch_of(BATCH, "near")) == ["label", "id"]


def test_a_batch_of_one_data_set_is_itself():
    alone = {name: BATCH[name] for name in FIELDS[:5]}
    assert batch_of(alone) == alone
    with pytest.raises(ConfigError, match=r"no data set 'far' beside the first \(there: none\)"):
        batch_of(alone, "far")


def test_one_that_is_not_there_names_those_that_are():
    with pytest.raises(ConfigError, match=r"'target'.*there: far, near.*data.beside.target"):
        batch_of(BATCH, "target")
