"""What `sluice train --hostfile` has done on every host: ``python -m launch.node run WORD`` under DeepSpeed's launcher.

``ask WORD FILE`` comes before: it prints a free port, or says why this host cannot take part.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from launch.hosts import Order
from pipeline.config.exitcodes import FINISHED, REQUEUE
from pipeline.config.load import load_run
from pipeline.core.errors import LaunchError, SluiceError


def enter(order: Order) -> None:
    """Go where the starter is.

    Raises:
        LaunchError: that folder is not here.
    """
    try:
        os.chdir(order.folder)
    except OSError as error:
        raise LaunchError(f"no folder {order.folder} here: {error.strerror}; all hosts need the same paths") from error


def ask(order: Order, seen: Path) -> int:
    """A free port of this host.

    Raises:
        LaunchError: ``seen``, which the starter has made in the run folder, is not here.
        ConfigError: the configuration cannot be read here.
    """
    enter(order)
    load_run(order.config, order.overrides)
    if not seen.exists():
        raise LaunchError(f"the run folder {seen.parents[1]} is not the same here; put it on a file system that is")
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def run(order: Order) -> int:
    """This host's part. Returns an exit code that is 0 also when the run saved to go on later."""
    from launch.local import PLACE, train_part

    enter(order)
    node = int(os.environ["RANK"])  # the launcher above starts one process per host
    for name in (*PLACE, "CUDA_VISIBLE_DEVICES"):  # set by that launcher
        os.environ.pop(name, None)
    os.environ.update(order.environment)
    config = load_run(order.config, order.overrides)
    code = train_part(config, Path(order.config), order.overrides, order.part(node), tied=True)
    return FINISHED if code == REQUEUE else code


def main() -> int:
    """Exit code; what the user can mend is one message."""
    try:
        if sys.argv[1] == "ask":
            print(ask(Order.read(sys.argv[2]), Path(sys.argv[3])))
            return FINISHED
        return run(Order.read(sys.argv[2]))
    except SluiceError as error:
        print(f"sluice: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
