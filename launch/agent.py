"""``python -m launch.agent job.json``: what a SLURM job runs on its first node, from the batch script on.

It starts the ranks by srun, hands requests to stop on to them, and when they have ended decides what follows
(:mod:`launch.decide`): nothing, the same again inside the allocation, or the job back into the queue. It needs nothing
but the standard library, so that the host's Python will do where the ranks live in a container.

Signals that SLURM sends come here (``--signal=B:USR1@t``), to the ranks, or to both. The ranks agree on stopping by
themselves, so here it is enough to put down the stop file. No signal is handed on: SIGTERM makes srun kill the ranks
instead of telling them, and SIGUSR1 kills those that are still starting.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from launch import history, hosts, slurm
from launch.decide import Decision, Ended, Queue, decide
from launch.history import Attempt
from launch.job import MASTER, TASK, Job
from launch.local import child_environment
from launch.supervise import CRASH, STATE, STOP, make_ready, outcome
from pipeline.config.exitcodes import CONFIG, FINISHED, INCOMPLETE, NONFINITE, REQUEUE
from pipeline.core.errors import LaunchError
from pipeline.core.files import stamp
from pipeline.record.beats import read_beats
from pipeline.record.paces import slow_nodes

PORTS = range(20_000, 32_000)
"""Below the ports that Linux gives out by itself."""
POLL_SECONDS = 0.2
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class Agent:
    """One start of a job.

    Args:
        job: what to do.
        environment: SLURM's, of the batch script.
    """

    def __init__(self, job: Job, environment: Mapping[str, str]) -> None:
        self.job = job
        self.environment = environment
        self.task = environment.get("SLURM_ARRAY_TASK_ID", "0")
        self.number = int(environment["SLURM_JOB_ID"])
        """Of the job alone, also in an array."""
        array = environment.get("SLURM_ARRAY_JOB_ID")
        self.id = f"{array}_{self.task}" if array else environment["SLURM_JOB_ID"]
        """As the one that submitted it knows it."""
        self.restart = int(environment.get("SLURM_RESTART_COUNT", "0"))
        self.nodes = slurm.node_names(environment["SLURM_JOB_NODELIST"])
        self.run_folder = Path(job.run.replace(TASK, self.task))
        self.ready: Mapping[str, str] = {}
        """What the ranks are to know of the run folder."""
        self.signalled: str | None = None
        self.stop_at = self._stop_at()

    def _stop_at(self) -> float | None:
        """When the ranks are to be asked to save; None: there is no time limit, or only SLURM's signal tells of it."""
        try:
            end = slurm.end_time(self.id)
        except LaunchError as error:  # no reason to give up the nodes: the signal comes at about the same time
            say(f"{error}; the time limit is not known, waiting for SLURM's signal")
            return None
        return None if end is None else end - self.job.stop_seconds

    def run(self) -> int:
        """Until the job is over, or is queued again. Returns the exit code of the batch script."""
        self.ready = make_ready(self.run_folder, {})
        if self.job.kind != "pretrain":  # ranks that train forget what an earlier start was asked by themselves
            (self.run_folder / STOP).unlink(missing_ok=True)
        _listen(self._asked)
        while True:
            decision, code = self._attempt()
            self._follow(decision)
            if decision.action != "restart":
                return code

    def replace(self, start: str) -> int:
        """Instead of :meth:`run`, once another agent of this start of the job was killed."""
        self._follow(self._decide(Ended(CRASH, self._newest_beat()[1], {}, self._queue(), has_agent=False), start))
        return CRASH

    def _follow(self, decision: Decision) -> None:
        """Do what was decided, but for starting the ranks."""
        say(f"{decision.action}: {decision.reason}")
        if decision.action == "requeue":
            self._requeue()
        elif decision.action == "stop" and history.asked_to_end(self.run_folder, self.id):
            self._end_cancelled()

    def _attempt(self) -> tuple[Decision, int]:
        """Start the ranks once, wait until they have ended, and decide."""
        start = history.now()
        known_bad = history.bad_nodes(self.run_folder)
        stamp_before, attempt_before = stamp(self.run_folder / STATE), self._newest_beat()[0]
        status = self._run_step()
        code = outcome(self.run_folder, stamp_before, status) if self.job.kind == "pretrain" else status
        attempt, step = self._newest_beat()
        bad = {n: why for n, why in history.bad_nodes(self.run_folder).items() if n not in known_bad}
        queue = self._queue()
        suite = self.job.kind == "evaluate"
        settled = (FINISHED, CONFIG, NONFINITE, REQUEUE, *([INCOMPLETE] if suite else []))
        if code not in settled and not bad:
            bad = self._check_nodes(alive=queue == "ours")
        slow = self._slow_nodes(attempt, bad) if self.job.leave_out_slow and attempt != attempt_before else {}
        step = step if attempt != attempt_before else None
        return self._decide(Ended(code, step, bad, queue, slow_nodes=slow, suite=suite), start), code

    def _decide(self, ended: Ended, start: str) -> Decision:
        """What follows, written down."""
        before = [a for a in history.attempts(self.run_folder) if a.job == self.id]
        decision = decide(ended, before, self.job.budget)
        entry = Attempt(
            job=self.id,
            restart=self.restart,
            nodes=self.nodes,
            start=start,
            end=history.now(),
            exit_code=ended.exit_code,
            step=ended.step,
            decision=decision.action,
            reason=decision.reason,
            excluded=decision.exclude,
        )
        history.append(self.run_folder, entry)
        return decision

    def _queue(self) -> Queue:
        """What SLURM, or the job's owner, does with it."""
        if history.asked_to_end(self.run_folder, self.id):
            return "cancelled"
        try:
            return slurm.queue_of(slurm.patiently(lambda: slurm.facts(self.id)), self.restart)
        except slurm.MissingCommand as error:
            say(f"{error}; what SLURM does with the job is not known")
            return "ours"

    def _newest_beat(self) -> tuple[int | None, int | None]:
        """Number of the newest attempt of which a rank has said something, and the furthest step it was at."""
        beats = read_beats(self.run_folder)
        return (beats[0].attempt, max(b.step for b in beats)) if beats else (None, None)

    def _check_nodes(self, alive: bool) -> dict[str, str]:
        """Nodes of the allocation that are lost; remembered. Only while the job is ``alive`` can they be tried out."""
        try:
            bad = slurm.patiently(lambda: slurm.unsound(self.nodes, alive=alive))
        except slurm.MissingCommand as error:
            say(f"{error}; the nodes are taken for sound")
            return {}
        if bad:
            history.add_bad_nodes(self.run_folder, bad)
        return bad

    def _slow_nodes(self, attempt: int | None, bad: Mapping[str, str]) -> dict[str, str]:
        """Nodes that stayed slow in an attempt, the slowest first, as many as the job can do without."""
        slow = {node: why for node, why in slow_nodes(self.run_folder, attempt).items() if node in self.nodes}
        if not slow:
            return {}
        try:
            known = slurm.patiently(lambda: slurm.usable(self.environment.get("SLURM_JOB_PARTITION", "")))
        except LaunchError as error:  # being slow is no reason not to go on
            say(f"{error}; which nodes there are is not known, so the slow ones stay")
            return {}
        spare = max(0, len(known - self._excluded() - bad.keys()) - self.job.nodes)
        if spare < len(slow):
            say(f"of the slow nodes ({', '.join(slow)}) {spare} can be left out: the partition has no more others")
        return dict([*slow.items()][:spare])

    def _excluded(self) -> set[str]:
        """Nodes that this job does not run on any more."""
        own = (a for a in history.attempts(self.run_folder) if a.job == self.id)
        return {node for attempt in own for node in attempt.excluded}

    def _run_step(self) -> int:
        """The ranks, by srun. Returns its exit code."""
        where = self._rendezvous()
        environment = child_environment(self.job.ranks_per_node) | where | {**self.job.environment, **self.ready}
        command = self._command(f"{where['MASTER_ADDR']}:{where['MASTER_PORT']}")
        step = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
        told = False
        while (status := step.poll()) is None:
            if not told and (reason := self.signalled or self._time_to_stop()):
                with suppress(OSError):  # a file system that fails for a while is tried again
                    (self.run_folder / STOP).touch()
                    say(f"asked to stop ({reason}); the ranks save first")
                    told = True
            time.sleep(POLL_SECONDS)
        return status

    def _time_to_stop(self) -> str | None:
        """Why the ranks are to save and end, where no signal says so."""
        if self.stop_at is not None and time.time() >= self.stop_at:
            return "the time limit is near"
        return "cancelled" if history.asked_to_end(self.run_folder, self.id) else None

    def _arguments(self, master: str) -> list[str]:
        """Of Python, with what is known only now."""
        if self.job.kind == "prepare":
            return [argument.replace(TASK, self.task) for argument in self.job.arguments]
        return [master if argument == MASTER else argument for argument in self.job.arguments]

    def _command(self, master: str) -> list[str]:
        """Of srun: one task per rank, or per node where DeepSpeed's launcher starts the ranks of a node."""
        per_node = 1 if self.job.launcher == "deepspeed" else self.job.ranks_per_node
        shape = [f"--nodes={self.job.nodes}", f"--ntasks={self.job.nodes * per_node}", f"--ntasks-per-node={per_node}"]
        return [
            *("srun", "--kill-on-bad-exit=1", "--wait=60", "--unbuffered"),
            *shape,
            *self.job.srun,
            *self.job.python,
            *("-m", "launch.rank", *self._arguments(master)),
        ]

    def _rendezvous(self) -> dict[str, str]:
        """Where the ranks meet: on this node, where rank 0 is, at a port that is this job's own and free."""
        interface = self.job.interface
        address = socket.gethostname() if interface is None else hosts.address_of(interface)
        if address is None:
            raise LaunchError(f"network interface {interface!r} has no IPv4 address here; see the cluster's profile")
        names = {} if interface is None else {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
        return {"MASTER_ADDR": address, "MASTER_PORT": str(port_of(self.number))} | names

    def _asked(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. It only says so: SLURM may signal this process and its parent, and handlers nest."""
        self.signalled = self.signalled or signal.Signals(number).name

    def _requeue(self) -> None:
        """Back into the queue, for a start without SLURM's two minutes of waiting where it allows that."""
        _listen(signal.SIG_IGN)  # what ends this job now must not end this as well; inherited
        if self._queue() != "requeueing":
            try:
                slurm.patiently(lambda: slurm.requeue(self.id))
            except slurm.MissingCommand as error:
                return say(f"{error}; the job cannot be queued again from here: sluice resume {self.run_folder}")
        try:
            slurm.soon(self.id, sorted(self._excluded()))
        except LaunchError as error:
            say(f"{error}; it starts again in two minutes, on any node")

    def _end_cancelled(self) -> None:
        """Have SLURM say that the job was cancelled, and not that it failed."""
        _listen(signal.SIG_IGN)
        slurm.patiently(lambda: slurm.call("scancel", self.id))


def port_of(job: int) -> int:
    """A port that other jobs do not choose, and that nobody on this machine listens at."""
    for attempt in range(100):
        port = PORTS[(job * 7 + attempt) % len(PORTS)]
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(("", port))
            except OSError:
                continue
            return port
    raise LaunchError(f"no free port among a hundred after {PORTS[job * 7 % len(PORTS)]}")


def say(text: str) -> None:
    """Into the job's log, at once."""
    os.write(2, f"sluice: {history.now()} {text}\n".encode())


def _listen(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    """Have a handler for the signals, those included that came since the process began."""
    for number in SIGNALS:
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _supervised(job: Job) -> int:
    """Run the agent in a child process, so that somebody is left to queue the job again should it be killed."""
    start = history.now()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    child = os.fork()
    if not child:
        return Agent(job, os.environ).run()

    def hand_on(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):  # what ends a job that has just been cancelled comes at this moment
            os.kill(child, number)

    _listen(hand_on)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    _listen(signal.SIG_IGN)
    if code >= 0:
        return code
    say(f"the agent was killed by {signal.Signals(-code).name}")
    return Agent(job, os.environ).replace(start)


def main(argv: Sequence[str]) -> int:
    """Exit code of the batch script."""
    try:
        task = os.environ.get("SLURM_ARRAY_TASK_ID", "0")
        return _supervised(Job.read(Path(argv[0].replace(TASK, task))))
    except LaunchError as error:
        say(str(error))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
