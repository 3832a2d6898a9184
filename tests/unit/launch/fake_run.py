"""Stands in for a run and its launcher, without torch: ``python -m tests.unit.launch.fake_run FOLDER WORD ...``.

The words are done in order. A rank writes its process id into ``FOLDER/pids`` first.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def rank(folder: Path, words: list[str]) -> int:
    with open(folder / "pids", "a") as f:
        f.write(f"{os.getpid()}\n")
    for word in words:
        kind, _, value = word.partition("=")
        if kind == "state":
            part = folder / f".state.{os.getpid()}"
            part.write_text(value)
            os.replace(part, folder / "state.json")
        elif kind == "exit":
            return int(value)
        elif kind == "die":
            os.kill(os.getpid(), int(value))
        elif kind == "kill-parent":
            os.kill(os.getppid(), signal.SIGKILL)
        elif kind == "ignore":
            signal.signal(int(value), signal.SIG_IGN)
        elif kind == "launch":  # as DeepSpeed's runner: its children's signals come out as 0
            code = subprocess.run([sys.executable, "-m", __spec__.name, str(folder), *json.loads(value)]).returncode
            return max(0, code)
        elif kind == "until-asked":  # as a rank: a handler sets a flag, and the loop saves and stops
            asked: list[int] = []
            signal.signal(signal.SIGUSR1, lambda number, frame: asked.append(number))
            (folder / "ready").touch()
            while not asked:
                time.sleep(0.01)
        elif kind == "until-file":  # as a rank that has no handler yet
            (folder / "ready").touch()
            while not (folder / "stop").exists():
                time.sleep(0.01)
        elif kind == "hang":
            (folder / "ready").touch()
            while True:
                time.sleep(60)
        elif kind == "environment":
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "DS_ACCELERATOR")
            facts = {name: os.environ.get(name) for name in names}
            (folder / f"rank-{facts['RANK']}.json").write_text(json.dumps({"argv": sys.argv[1:], **facts}))
        else:
            raise ValueError(word)
    return 0


if __name__ == "__main__":
    sys.exit(rank(Path(sys.argv[1]), sys.argv[2:]))
