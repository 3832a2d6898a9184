"""``make demo``: shards, pretraining on two processes, a kill and a resume, probes and a report, in a few minutes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from pipeline.core.errors import LaunchError, SluiceError

SLUICE = str(Path(sys.executable).with_name("sluice"))
SHARDS = Path("shards/glyphs50")
RUN = Path("runs/demo/mae_glyphs")
CONFIG = "configs/demo/mae_glyphs.toml"
SUITE = "configs/eval/glyphs50.toml"
PREP = ("prep", "build", "glyphs", str(SHARDS), "--characters", "50", "--samples", "6", "--variation", "0.4")
RANKS = 2


def say(text: str) -> None:
    """A heading."""
    print(f"\n== {text}", flush=True)


def sluice(*arguments: str) -> None:
    """One command, as a person would type it.

    Raises:
        LaunchError: it failed.
    """
    print(f"$ sluice {' '.join(arguments)}", flush=True)
    code = subprocess.run([SLUICE, *arguments]).returncode
    if code:
        raise LaunchError(f"`sluice {arguments[0]}` ended with exit code {code}; its message is above")


def logged_step() -> int:
    """Last step in the run's metrics; 0 before the first."""
    path = RUN / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def total_steps() -> int:
    """Length of the run, as it noted at its start."""
    return json.loads((RUN / "provenance.json").read_text())["plan"]["total_steps"]


def find_rank(rank: int) -> int:
    """Process id of a rank of the demo's run."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:  # gone, or somebody else's
                continue
            if b"pipeline.run" in words and CONFIG.encode() in words and b"RANK=%d" % rank in environment:
                return int(entry.name)
    raise LaunchError(f"rank {rank} of the demo is not running; see {RUN}")


def train_and_kill() -> None:
    """Train, and kill a rank half way, without warning.

    Raises:
        LaunchError: the run ended by itself before that.
    """
    print(f"$ sluice train {CONFIG} --procs {RANKS}", flush=True)
    run = subprocess.Popen([SLUICE, "train", CONFIG, "--procs", str(RANKS)])
    try:
        while not logged_step() or logged_step() < total_steps() / 2:
            if run.poll() is not None:
                raise LaunchError(f"training ended early with exit code {run.returncode}; its message is above")
            time.sleep(0.2)
        victim = find_rank(RANKS - 1)
        say(f"kill -9 of rank {RANKS - 1} (process {victim}) at step {logged_step()}")
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        code = run.wait(timeout=60)
        print(f"the run ended {time.monotonic() - killed:.1f} s later with exit code {code}", flush=True)
    finally:
        if run.poll() is None:
            run.terminate()
            run.wait()


def demo() -> None:
    """The whole line, from nothing to a report."""
    began = time.monotonic()
    shutil.rmtree(RUN, ignore_errors=True)
    say("build shards from the embedded glyphs; some typefaces are held out for validation")
    sluice(*PREP)
    say(f"pretrain a masked autoencoder with DeepSpeed on {RANKS} processes")
    train_and_kill()
    say("the same command again: resume from the newest whole checkpoint, and finish")
    sluice("train", CONFIG, "--procs", str(RANKS))
    say("evaluate a random encoder of the same shape, then the pretrained one, on the held-out typefaces")
    sluice("eval", str(RUN), SUITE, "--random-init")
    sluice("eval", str(RUN), SUITE)
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    say(f"done in {minutes} min {seconds} s; open {(RUN / 'report.html').resolve()}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # what it has started ends with it
    try:
        demo()
    except SluiceError as error:
        sys.exit(f"sluice: {error}")
