"""Stands in for a run and its launcher, without torch: ``python -m tests.unit.launch.fake_run FOLDER WORD ...``.

The words are done in order; each is the name of a function here, with ``=VALUE`` where it needs one. Every process
writes its id into ``FOLDER/pids`` first.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

FACTS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "DS_ACCELERATOR", "SLUICE_OLD_STOP")
FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()


def state(text):
    part = FOLDER / f".state.{os.getpid()}"
    part.write_text(text)
    os.replace(part, FOLDER / "state.json")


def leave(code):
    sys.exit(int(code))


def send_me(number):
    os.kill(os.getpid(), int(number))


def kill_parent(_):
    os.kill(os.getppid(), signal.SIGKILL)


def ignore(number):
    signal.signal(int(number), signal.SIG_IGN)


def launch(words):
    """As DeepSpeed's runner: a child that a signal kills comes out as 0."""
    code = subprocess.run([sys.executable, "-m", __spec__.name, str(FOLDER), *json.loads(words)]).returncode
    sys.exit(max(0, code))


def until_asked(_):
    """As a rank: a handler sets a flag, and the loop saves and stops."""
    asked = []
    signal.signal(signal.SIGUSR1, lambda number, frame: asked.append(number))
    (FOLDER / "ready").touch()
    while not asked:
        time.sleep(0.01)


def until_file(_):
    """As a rank that has no handler yet."""
    (FOLDER / "ready").touch()
    while not (FOLDER / "stop").exists():
        time.sleep(0.01)


def until(name):
    """Deaf to all but a file."""
    (FOLDER / "ready").touch()
    while not (FOLDER / name).exists():
        time.sleep(0.01)


def input_goes_on(_):
    assert not select.select([sys.stdin], [], [], 0)[0]


def wait(seconds):
    time.sleep(float(seconds))


def hang(_):
    (FOLDER / "ready").touch()
    while True:
        time.sleep(60)


def tell(_):
    facts = {"argv": sys.argv[1:], "folder": os.getcwd()} | {name: os.environ.get(name) for name in FACTS}
    (FOLDER / f"rank-{facts['RANK']}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    with open(FOLDER / "pids", "a") as f:
        f.write(f"{os.getpid()}\n")
    for word in sys.argv[2:]:
        name, _, value = word.partition("=")
        globals()[name](value)
