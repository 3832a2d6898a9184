"""What the ranks tell each other after every update, and what follows from it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from pipeline.core.errors import NonFiniteError
from pipeline.engine.stopping import StopRequest
from pipeline.engine.watch import Watch


class Saves:
    """Stands in for a saver: keeps what it is told."""

    progress = 3

    def __init__(self):
        self.heard = []

    def told(self, progress):
        self.heard.append(progress)


@pytest.mark.parametrize(
    ("loss", "norm", "text"),
    [
        (math.nan, 1.0, "step 7: the loss of rank 0 is nan"),
        (-math.inf, 1.0, "step 7: the loss of rank 0 is -inf"),
        (1.0, math.inf, "step 7: the gradient's norm is inf"),
    ],
)
def test_what_is_not_finite_is_raised_and_named(loss, norm, text, tmp_path, lone_group):
    watch = Watch(torch.device("cpu"), StopRequest(tmp_path))
    watch.exchange(6, torch.tensor(1.0), torch.tensor(2.0))
    with pytest.raises(NonFiniteError, match=text):
        watch.exchange(7, torch.tensor(loss), torch.tensor(norm))


def test_a_request_and_the_progress_of_saving_are_told(tmp_path, lone_group):
    saves = Saves()
    watch = Watch(torch.device("cpu"), StopRequest(tmp_path), saves)  # type: ignore[arg-type]
    watch.exchange(1, torch.tensor(1.0), torch.tensor(1.0))
    assert not watch.stopping and saves.heard == [[3]]
    (tmp_path / "stop").touch()
    watch.exchange(2, torch.tensor(1.0), torch.tensor(1.0))
    assert watch.stopping


def test_on_a_gpu_a_step_is_looked_at_after_the_next_one_or_when_it_must_be(tmp_path, lone_group):
    watch = Watch(torch.device("cpu"), StopRequest(tmp_path))
    watch.lag = 1
    watch.exchange(1, torch.tensor(math.nan), torch.tensor(1.0))
    with pytest.raises(NonFiniteError, match="step 1"):
        watch.settle()
    watch.exchange(2, torch.tensor(math.nan), torch.tensor(1.0))
    with pytest.raises(NonFiniteError, match="step 2"):
        watch.exchange(3, torch.tensor(1.0), torch.tensor(1.0))


@pytest.mark.world_size(2)
def test_what_one_rank_has_met_all_hear(tmp_path):
    dist.init_process_group("gloo")
    rank, stop = dist.get_rank(), StopRequest(tmp_path)
    watch = Watch(torch.device("cpu"), stop)
    stop.reason = "SIGTERM" if rank == 1 else None
    watch.exchange(1, torch.tensor(1.0), torch.tensor(1.0))
    assert watch.stopping
    with pytest.raises(NonFiniteError, match="step 2: the loss of rank 1 is nan"):
        watch.exchange(2, torch.tensor(math.nan if rank == 1 else 1.0), torch.tensor(1.0))
    dist.destroy_process_group()
