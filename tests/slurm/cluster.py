"""A real SLURM on this machine, for tests: munged, slurmctld and several slurmd, each of them a node.

Everything lies in one temporary folder and has ports, a munge socket and a key of its own, so that a SLURM or munge
that runs here anyhow is left alone. It needs root (slurmd does) and no systemd. Nodes may be killed and started again.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
CONF = """
ClusterName=sluice
SlurmctldHost={host}({address})
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
MpiDefault=none
SlurmdParameters=config_overrides
SwitchType=switch/none
SlurmctldTimeout=60
SlurmdTimeout={slurmd_timeout}
InactiveLimit=0
KillWait={kill_wait}
OverTimeLimit=0
MinJobAge=3600
{nodes}
PartitionName=work Nodes={names} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 OverSubscribe=NO
PartitionName=urgent Nodes={names} MaxTime=INFINITE State=UP PriorityTier=10 OverSubscribe=NO
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr={address} Port={port} CPUs=4 RealMemory=1000 State=UNKNOWN"
ADDRESS = "127.0.0.1"
GUARD = """
read -r over && exit
found=yes
while [ "$found" ]; do  # what they start meanwhile is not in the list yet
  found=
  for process in /proc/[0-9]*; do
    grep -qzxF "SLURM_CONF=$1/slurm.conf" "$process/environ" && kill -s KILL "${process#/proc/}" && found=yes
  done 2>/dev/null
done
rm -rf "$1"
"""
"""Should the tests themselves be killed, it kills what belongs to the cluster in the folder $1."""


def why_not() -> str | None:
    """Why no SLURM can be started here, if so."""
    if missing := [c for c in COMMANDS if shutil.which(c, path=search_path()) is None]:
        return f"needs {', '.join(missing)} (packages slurm-wlm and munge)"
    return "needs root, which slurmd runs as" if os.geteuid() else None


def search_path() -> str:
    """PATH with the folders of the daemons."""
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


class Cluster:
    """SLURM's daemons and its commands, as a user of the cluster sees them."""

    def __init__(self, names: Sequence[str], slurmd_timeout: int = 5, kill_wait: int = 30) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sluice-slurm-"))
        self.folder.chmod(0o755)  # munged wants its socket reachable by all
        self.conf = self.folder / "slurm.conf"
        self.environment = {"SLURM_CONF": str(self.conf), "PATH": search_path()}
        self.names = list(names)
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        ports = free_ports(len(names) + 1)
        host = socket.gethostname().partition(".")[0]
        nodes = [NODE.format(name=n, host=host, address=ADDRESS, port=p) for n, p in zip(names, ports[1:], strict=True)]
        self.conf.write_text(
            CONF.format(
                host=host,
                address=ADDRESS,
                ports=ports,
                folder=self.folder,
                slurmd_timeout=slurmd_timeout,
                kill_wait=kill_wait,
                nodes="\n".join(nodes),
                names=",".join(names),
            )
        )

    def __enter__(self) -> Cluster:
        self._guard = subprocess.Popen(
            ["bash", "-c", GUARD, "bash", str(self.folder)], stdin=subprocess.PIPE, start_new_session=True
        )
        with ExitStack() as undo:
            undo.callback(self._stop)
            try:
                self._start()
            except TimeoutError as error:
                raise RuntimeError(f"{error}\n{self.said()}") from error
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _start(self) -> None:
        for name in ("state", *(f"spool-{n}" for n in self.names)):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        places = {"socket": "socket", "pid-file": "pid", "seed-file": "seed"}
        options = [f"--{option}={self.folder}/munge.{suffix}" for option, suffix in places.items()]
        self._daemon("munged", "munged", "--foreground", f"--key-file={key}", *options)
        wait_for((self.folder / "munge.socket").exists, 10, "munged's socket")
        self._daemon("slurmctld", "slurmctld", "-D")
        wait_for(lambda: "UP" in self._try("scontrol", "ping"), 20, "slurmctld")
        for name in self.names:
            self.start_node(name)
        self.wait_nodes()

    def _daemon(self, key: str, *command: str) -> None:
        with (self.folder / f"{key}.out").open("ab") as out:
            self._daemons[key] = subprocess.Popen(
                command, env=os.environ | self.environment, stdout=out, stderr=out, start_new_session=True
            )

    def _stop(self) -> None:
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
            daemon.wait()
        while left := self.processes():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._guard.communicate(b"over\n")

    def said(self) -> str:
        """The last lines of every daemon."""
        files = sorted(self.folder.glob("*.out"))
        return "\n".join(f"== {f.name}\n" + "\n".join(f.read_text().splitlines()[-20:]) for f in files)

    def processes(self, variable: str = "SLURM_CONF", value: str | None = None) -> list[int]:
        """Processes of this cluster; if asked for, those that have this value of a variable in their environment."""
        wanted = {f"SLURM_CONF={self.conf}".encode()}
        if value is not None:
            wanted.add(f"{variable}={value}".encode())
        found: list[int] = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and wanted <= set((entry / "environ").read_bytes().split(b"\0")):
                    found.append(int(entry.name))
        return [p for p in found if p != os.getpid()]

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node."""
        self._daemon(name, "slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """Lose a node: its slurmd and all that runs on it are gone at once.

        All are stopped before the first is killed: a slurmstepd that lived for a moment longer than its job would tell
        the controller that the job has failed, which no node does that loses power.
        """
        slurmd = self._daemons.pop(name)
        slurmd.send_signal(signal.SIGSTOP)
        tasks = self.processes("SLURMD_NODENAME", name)
        lost = {pid for pid in map(parent, tasks) if command_of(pid) == "slurmstepd"} | set(tasks)
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in sorted(lost, key=tasks.__contains__):  # the slurmstepds first
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        slurmd.kill()
        slurmd.wait()

    def wait_nodes(self) -> None:
        """Until all nodes are up and idle."""
        wait_for(lambda: set(self._try("sinfo", "-h", "-N", "-p", "work", "-o", "%T").split()) == {"idle"}, 40, "nodes")

    def empty(self) -> None:
        """Cancel all jobs and wait until every node is idle."""
        self._try("scancel", "--user=root")
        wait_for(lambda: not self._try("squeue", "-h"), 40, "an empty queue", lambda: self._try("squeue"))
        self.wait_nodes()

    def run(self, *command: str, **environment: str) -> str:
        """Run a command against this cluster and return its output; fail with its message."""
        done = subprocess.run(
            command, env=os.environ | self.environment | environment, capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise AssertionError(f"{command} gave {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def _try(self, *command: str) -> str:
        done = subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self.run("squeue", "-h", "--jobs", job, "--states=all", "-o", "%T")

    def wait_state(self, job: str, *states: str, seconds: float = 60) -> str:
        """Wait until a job is in one of these states; returns it."""
        wait_for(
            lambda: self.state(job) in states, seconds, f"job {job} {' or '.join(states)}", lambda: self.state(job)
        )
        return self.state(job)


def wait_for(
    condition: Callable[[], object], seconds: float, what: str, now: Callable[[], object] = lambda: ""
) -> None:
    """Wait until ``condition`` holds; a TimeoutError names what did not come, and what is instead."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}: {now()}")
        time.sleep(0.1)


def parent(pid: int) -> int:
    """Of a process; 0 when it is gone."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return 0


def command_of(pid: int) -> str:
    """Name of a process's program; empty when it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def free_ports(count: int) -> list[int]:
    """Ports that are free at this moment."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind((ADDRESS, 0))
        return [s.getsockname()[1] for s in sockets]
