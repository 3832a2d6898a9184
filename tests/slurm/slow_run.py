"""``pipeline.run`` with steps that take a while and, where asked for, a rank that dies: for jobs that are disturbed.

SLUICE_TEST_PAUSE  seconds that a step takes longer
SLUICE_TEST_DIE    "RANK:STEP": this rank is killed whenever it has made this step, before that is saved
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from pipeline.core.protocols import Clock
from pipeline.run import train as training
from pipeline.run.__main__ import main

PAUSE = float(os.environ.get("SLUICE_TEST_PAUSE", "0"))
DIE = os.environ.get("SLUICE_TEST_DIE")
log = training.Job.log


def slow_log(job: Any, clock: Clock) -> None:
    log(job, clock)
    time.sleep(PAUSE)
    if f"{job.place.rank}:{clock.step}" == DIE:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    training.Job.log = slow_log  # type: ignore[method-assign]
    sys.exit(main(sys.argv[1:]))
