"""On an accelerator a rank's own time is the device's: neither what others are waited for, nor when the host calls."""

from __future__ import annotations

import pytest
import torch

from pipeline.dist.waits import Waits
from pipeline.engine.pace import Pace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
]
CYCLES = 100_000_000


def busy(cycles: int) -> float:
    """Seconds that the device sleeps for so many cycles."""
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(CYCLES // 10)
    first.record()
    torch.cuda._sleep(cycles)
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


@pytest.mark.parametrize("how", ["stream waits", "host waits"])
def test_what_the_computing_stream_waits_for_is_not_its_own(how):
    device, alone = torch.device("cuda", torch.cuda.current_device()), busy(CYCLES)
    waits, others = Waits(device), torch.cuda.Stream()
    with waits.listening():
        pace = Pace(waits)
        pace.at("data")
        pace.at("step")
        torch.cuda._sleep(CYCLES)  # its own
        with torch.cuda.stream(others):
            torch.cuda._sleep(4 * CYCLES)  # a collective, on a stream of its own: a quarter of it is hidden
        if how == "stream waits":
            torch.cuda.current_stream().wait_stream(others)
        else:
            others.synchronize()
        torch.cuda._sleep(CYCLES)
        assert pace.take()[1] == 0.0, "the host has not waited to know"
        torch.cuda.synchronize()
        own = pace.take()
    assert own[1] == pytest.approx(2 * alone, rel=0.2)
    assert own[0] < alone / 5
