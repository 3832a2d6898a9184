"""Going back to an earlier checkpoint: later ones are put aside, and nothing is lost."""

from __future__ import annotations

import pytest
import torch

from pipeline.core.errors import CheckpointError, LaunchError
from pipeline.engine.fragments import whole
from pipeline.record.files import read_lines
from pipeline.record.lock import RunLock
from pipeline.record.state import State, read_state, write_state
from pipeline.run.rewind import rewind
from tests.unit.engine.test_damaged_checkpoints import flip
from tests.unit.engine.test_saving import saver, value_of


@pytest.fixture
def saved(tmp_path, lone_group):
    """A finished run with checkpoints of steps 1 to 3."""
    saves = saver(tmp_path)
    for step in (1, 2, 3):
        saves.save(step, [whole("model/a", torch.full((5,), float(step)))], {"step": step})
    saves.finish()
    write_state(tmp_path, State("finished", 0, 3, 4))
    return saves.store


def test_later_ones_are_put_aside_and_the_next_start_goes_on_from_there(saved, tmp_path, capsys):
    assert rewind(str(tmp_path), 2) == 0
    assert saved.steps() == [1, 2] and value_of(tmp_path) == 2.0
    (aside,) = saved.folder.glob("aside-*/step-00000003/checkpoint.json")
    state = read_state(tmp_path)
    assert state is not None and (state.outcome, state.step, state.attempt) == ("requeue", 2, 4)
    (note,), _ = read_lines(tmp_path / "notes.jsonl")
    assert "went back to step 2" in note["text"] and str(aside.parents[1]) in note["text"]
    assert "1 later checkpoints are put aside" in capsys.readouterr().out


def test_what_is_not_there_or_not_whole_is_not_gone_back_to(saved, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; there are: 1, 2, 3"):
        rewind(str(tmp_path), 7)
    flip(saved.path(2) / "rank-00000.safetensors")
    with pytest.raises(CheckpointError, match="changed"):
        rewind(str(tmp_path), 2)
    assert saved.steps() == [1, 2, 3] and value_of(tmp_path) == 3.0


def test_a_run_at_work_is_left_alone(saved, tmp_path):
    held = RunLock(tmp_path)
    held.take()
    with pytest.raises(LaunchError, match="in use"):
        rewind(str(tmp_path), 1)
    assert saved.steps() == [1, 2, 3]
    held.release()
