"""Start the processes of a run, hand on requests to stop, leave none behind, and say how it ended.

DeepSpeed's launcher returns 0 when its own child died of a signal, hands no signal on, and may leave ranks behind that
go on training (reference: deepspeed/launcher/runner.py and launch.py, 0.19). So it is given a session of its own; a
request to stop reaches the ranks as a file and as a signal; when the launcher is gone, the rest of its session is
killed; and the outcome is read from the ``state.json`` that the run keeps, not from the launcher.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.config.exitcodes import CONFIG, FINISHED, NONFINITE, REQUEUE
from pipeline.core.errors import LaunchError
from pipeline.core.files import stamp
from pipeline.record.lock import refuse_second
from pipeline.record.state import INTERRUPTED, close_state, read_state

STATE = "state.json"
"""Kept by the run in its folder: {"outcome": "running" | "finished" | "requeue" | "failed", "exit_code": int, ...}."""
STOP = "stop"
"""When this file appears in the run folder, the ranks save and end."""
OLD_STOP = "SLUICE_OLD_STOP"
"""Variable of the ranks: the stamp of a stop file that was there before; see :mod:`pipeline.engine.stopping`."""
CRASH = 1
"""Exit code of a run that ended without saying why."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
WATCH_SECONDS = 1.0
LINGER_SECONDS = 10.0
"""How long the processes of a run that has failed may take to end."""
KILL_SECONDS = 10.0
"""How long killed processes may take to go; longer when one is stuck in the kernel, and then no signal helps."""


def supervise(
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    watch: Callable[[], str | None] | None = None,
    working_folder: str | None = None,
) -> int:
    """Run ``command`` until it and all that it started have ended: the launch sequence, wherever ranks are started.

    SIGINT, SIGTERM, SIGUSR1 and SIGHUP ask the run to save and stop; a second SIGINT kills it. Should this process
    itself be killed, the processes of the run are killed too.

    Args:
        command: the run, or its launcher.
        folder: the run's folder; made if it is not there.
        environment: of the run.
        watch: see :func:`run_session`; None: for a run that has failed, but does not end.
        working_folder: of the command; None: this process's.

    Returns:
        0 finished, 2 something to mend, 70 not finite, 75 saved after a request to stop, 1 anything else.

    Raises:
        LaunchError: the run's folder cannot be written.
    """
    environment = {**make_ready(folder, environment), **environment}
    before = stamp(folder / STATE)
    watch = watch or _Lingers(folder, before)
    return outcome(folder, before, run_session(command, folder, environment, watch, working_folder))


class _Lingers:
    """Notices a run that has failed and said so, but does not end: as when one of its ranks is stopped.

    Args:
        folder: the run's.
        before: the stamp of its state before it began.
    """

    def __init__(self, folder: Path, before: str | None) -> None:
        self.path, self.before = folder / STATE, before
        self.since: float | None = None

    def __call__(self) -> str | None:
        """A reason to kill it."""
        state = read_state(self.path.parent)
        if state is None or state.outcome != "failed" or stamp(self.path) == self.before:
            return None
        self.since = self.since or time.monotonic()
        over = time.monotonic() - self.since > LINGER_SECONDS
        return f"the run has failed, and its processes are still there after {LINGER_SECONDS:.0f} s" if over else None


def outcome(folder: Path, before: str | None, status: int) -> int:
    """Exit code of a run that has ended; says so when it crashed.

    Args:
        folder: the run's.
        before: the stamp of its state before it began.
        status: exit code of its launcher, negative for a signal.
    """
    fresh = stamp(folder / STATE) != before
    code = _exit_code(folder / STATE if fresh else None, status)
    if code == CRASH:
        say(f"the run died (status {status}); start it again to go on from its newest checkpoint")
    return code


def make_ready(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Have a run folder in which nobody is at work. Nothing in it is changed: the ranks may yet refuse to run.

    Args:
        folder: the run's.
        environment: of the ranks; who has made the folder ready before, as the starter on another host, has said so.

    Returns:
        What the ranks are to know of it, as variables.

    Raises:
        LaunchError: the folder cannot be written, or somebody is at work in it.
    """
    if OLD_STOP in environment:
        return {}
    refuse_second(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"cannot write the run folder {folder}: {error.strerror}; set run.folder") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise LaunchError(f"cannot write the run folder {folder}, it is not yours; set run.folder")
    return {OLD_STOP: stamp(folder / STOP) or "none"}


def run_session(
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    watch: Callable[[], str | None] = lambda: None,
    working_folder: str | None = None,
) -> int:
    """Run ``command`` in a session of its own until that is empty; see :func:`supervise`.

    Args:
        command: the run, or its launcher. Its standard input is a pipe that ends when this process does.
        folder: the run's folder.
        environment: of the run.
        watch: asked about every second; a text is the reason to kill the session.
        working_folder: of the command; None: this process's.

    Returns:
        The exit code of ``command``; negative for a signal.
    """
    with _stop_requests(folder) as requests:
        child = subprocess.Popen(
            command, env=environment, cwd=working_folder, stdin=subprocess.PIPE, start_new_session=True
        )
        guard = _start_guard(child.pid)
        try:
            requests.attach(child.pid)
            while _wait(child) is None:
                if reason := watch():
                    say(reason)
                    break
        finally:
            kill_session(child.pid)
            child.communicate()
            guard.communicate(b"over\n")
            if requests.impatient:
                with suppress(OSError):  # on a full disk it looks like a crash
                    close_state(folder, "failed", CRASH, error=INTERRUPTED)
    return child.returncode


def _wait(child: subprocess.Popen[bytes]) -> int | None:
    """Its exit code, or None when it still runs after a while."""
    try:
        return child.wait(timeout=WATCH_SECONDS)
    except subprocess.TimeoutExpired:
        return None


class _Requests:
    """What has been asked of the run by signals to this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.session: int | None = None
        self.seen: list[int] = []
        self.impatient = False
        """Asked to kill it."""

    def attach(self, session: int) -> None:
        """From now on there are processes to tell; tell them what was asked meanwhile."""
        self.session = session
        if self.seen:
            self._tell(session)

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler."""
        again = signum == signal.SIGINT and signal.SIGINT in self.seen
        self.seen.append(signum)
        if self.session is None:
            return
        if again:
            with suppress(ProcessLookupError):
                os.killpg(self.session, signal.SIGKILL)
            self.impatient = True
        else:
            self._tell(self.session)

    def _tell(self, session: int) -> None:
        with suppress(OSError):  # a full disk: those on this machine still hear the signal
            (self.folder / STOP).touch()
        # Only those that have a handler: launchers and loader workers would die of it, and so would a rank that is
        # still starting (it finds the file).
        for process in session_members(session):
            if process.catches(signal.SIGUSR1):
                process.send(signal.SIGUSR1)
        say("asked to stop; the run saves first (Ctrl-C twice kills it)")


def say(text: str) -> None:
    """A line of this process's own on stderr."""
    # Not print: a signal handler may interrupt another one here, and buffered files cannot be entered twice.
    os.write(2, f"sluice: {text}\n".encode())


@contextmanager
def _stop_requests(folder: Path) -> Generator[_Requests]:
    requests = _Requests(folder)
    handled = [s for s in STOP_SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]  # nohup ignores SIGHUP
    old = {s: signal.signal(s, requests) for s in handled}
    try:
        yield requests
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def _start_guard(session: int) -> subprocess.Popen[bytes]:
    """A process that kills the session as soon as this one is gone without having said that all is over."""
    script = 'read -r over || kill -s KILL -- "-$1"'
    return subprocess.Popen(["sh", "-c", script, "sh", str(session)], stdin=subprocess.PIPE, start_new_session=True)


class Process:
    """A process of a session, as /proc shows it."""

    def __init__(self, pid: int, status: str) -> None:
        self.pid = pid
        self._facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)

    @property
    def over(self) -> bool:
        """Dead, though nobody may have asked for its exit code yet."""
        return self._facts["State"][0] in "ZX"

    def catches(self, signum: int) -> bool:
        """Whether it has a handler for the signal."""
        return bool(int(self._facts["SigCgt"], 16) >> (signum - 1) & 1)

    def send(self, signum: int) -> None:
        """Send a signal, unless it is gone."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signum)


def session_members(session: int) -> list[Process]:
    """The processes of a session that are not over."""
    members: list[Process] = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        try:
            if os.getsid(pid) == session:
                members.append(Process(pid, Path(entry.path, "status").read_text()))
        except (ProcessLookupError, FileNotFoundError):
            continue  # gone since the folder was listed
    return [m for m in members if not m.over]


def kill_session(session: int) -> None:
    """Kill what is left of a session, and wait until it is gone."""
    deadline = time.monotonic() + KILL_SECONDS
    while (left := session_members(session)) and time.monotonic() < deadline:
        for process in left:
            process.send(signal.SIGKILL)
        time.sleep(0.02)
    if left:
        pids = ", ".join(str(p.pid) for p in left)
        say(f"processes {pids} do not die; look at them before starting again")


def _exit_code(state: Path | None, status: int) -> int:
    """What the run says of its end; where it says nothing, what its launcher says, if that can be believed.

    Args:
        state: the run's state file, None if this run did not write it.
        status: exit code of the launcher, negative for a signal.
    """
    facts: dict[str, Any] = {"outcome": "unknown"}
    if state is not None:
        with suppress(OSError, ValueError):  # torn: on a full disk it is not replaced but overwritten
            facts = json.loads(state.read_text(encoding="utf-8"))
    if facts["outcome"] in ("finished", "requeue"):
        return FINISHED if facts["outcome"] == "finished" else REQUEUE
    if facts["outcome"] == "failed":
        return facts["exit_code"]
    return status if status in (CONFIG, NONFINITE) else CRASH
