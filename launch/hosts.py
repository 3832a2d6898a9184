"""Several hosts without SLURM: this machine as one of them, and all of them over ssh from here.

By hand, the same command is given on each host; `--hostfile` has DeepSpeed's multi-node runner (pdsh, ssh) give it.
That runner by itself pastes arguments into a shell line, hands on neither environment nor signals, and leaves ranks
behind on the other hosts (reference: deepspeed/launcher/runner.py and multinode_runner.py, 0.19). So it carries one
word without special characters, :mod:`launch.node` on each host unpacks it, and a supervisor there ends its ranks when
another host's part has failed or the connection to the starter is gone. All hosts must see the same run folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shlex
import socket
import struct
import subprocess
import sys
import tempfile
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.core.errors import LaunchError
from pipeline.core.files import stamp

PORT = 29500
"""Of the master, where none is named."""
DOWN = "launch/down"
"""Replaced in the run folder when a host's part has failed: the others end theirs."""
GRACE_SECONDS = 5.0
"""How long ranks have to end by themselves when the rest of the run is gone."""
SSH_OPTIONS = (
    *("-o", "BatchMode=yes", "-o", "ConnectTimeout=10"),
    *("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"),
)
"""No questions, and a lost host is noticed."""
_CARRIED = ("NCCL_", "GLOO_", "UCX_", "FI_", "TORCH_", "OMP_", "MKL_", "DS_", "HF_", "MLFLOW_", "SLUICE_", "PYTHONWARN")
_EXPORTED = ("PYTHON", "PATH", "LD_LIBRARY")
"""What DeepSpeed's runner pastes into a shell line by itself."""
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")
_WORD = re.compile(r"[\w@%+=:,./-]+", re.ASCII)


@dataclass(frozen=True)
class Part:
    """The part of a run that one host has."""

    node: int
    """Number of this host."""
    slots: tuple[int, ...]
    """Ranks on each host."""
    address: str
    """Of host 0, as the others reach it."""
    port: int
    neighbour: str
    """A host whose route tells which network interface to use."""

    @property
    def first(self) -> bool:
        """Host 0, where rank 0 is."""
        return self.node == 0


@dataclass(frozen=True)
class Order:
    """What the starter tells every host."""

    folder: str
    """Working folder, so that relative paths mean the same."""
    config: str
    overrides: list[str]
    hosts: list[str]
    slots: list[int]
    port: int
    environment: dict[str, str]

    def word(self) -> str:
        """One word that no shell looks into."""
        return urlsafe_b64encode(json.dumps(asdict(self)).encode()).decode().replace("=", "")

    @classmethod
    def read(cls, word: str) -> Order:
        """Undo :meth:`word`."""
        return cls(**json.loads(urlsafe_b64decode(word + "=" * (-len(word) % 4))))

    def part(self, node: int) -> Part:
        """That of host ``node``."""
        neighbour = self.hosts[0] if node or len(self.hosts) == 1 else self.hosts[1]
        return Part(node, tuple(self.slots), self.hosts[0], self.port, neighbour)


def by_hand(master: str, nodes: int, node: int, procs: int) -> Part:
    """The part of this machine, as the command line says it.

    Args:
        master: "ADDRESS" or "ADDRESS:PORT" of host 0.
        nodes: hosts of the run.
        node: number of this one.
        procs: ranks on each.

    Raises:
        LaunchError: the numbers do not fit, or no such address.
    """
    address, _, port = master.partition(":") if master.count(":") <= 1 else master.rpartition(":")
    if not 0 <= node < nodes:
        raise LaunchError(f"--node-rank {node} is not one of 0 to {nodes - 1}; number the hosts from 0")
    if port and not (port.isdigit() and 0 < int(port) < 2**16):
        raise LaunchError(f"--master {master}: {port!r} is not a port; write ADDRESS or ADDRESS:PORT")
    return Part(node, (procs,) * nodes, address.strip("[]"), int(port or PORT), address.strip("[]"))


def check_port(part: Part) -> None:
    """Before ranks are started on host 0: nobody may listen at the master's port.

    Raises:
        LaunchError: somebody does.
    """
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("", part.port))
        except OSError as error:
            raise LaunchError(
                f"port {part.port} of {part.address} cannot be taken: {error.strerror}; "
                f"name another on every host: --master {part.address}:PORT"
            ) from error


def interface(part: Part) -> str | None:
    """Name of the network interface towards the other hosts; None when it has no IPv4 address.

    Raises:
        LaunchError: they cannot be found from here, or only by the loopback.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.connect((part.neighbour, part.port))  # sends nothing, but chooses the route
            own = s.getsockname()[0]
    except socket.gaierror as error:
        raise LaunchError(f"host {part.neighbour} is not known here: {error.strerror}; use its IP address") from error
    except OSError as error:
        raise LaunchError(f"no way from here to {part.neighbour}: {error.strerror}") from error
    if own.startswith("127.") and len(part.slots) > 1:
        raise LaunchError(
            f"{part.neighbour} is this machine's loopback, where other hosts cannot reach it; name the address of "
            "host 0 in their network"
        )
    names = [name for _, name in socket.if_nameindex() if address_of(name) == own]
    return names[0] if names else None


def address_of(name: str) -> str | None:
    """IPv4 address of an interface."""
    get_address = 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            answer = fcntl.ioctl(s.fileno(), get_address, struct.pack("256s", name.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])


class Others:
    """What of the rest of the run this host's supervisor watches.

    Args:
        folder: the run's.
        tied: this machine was told to run over a connection that is standard input; when it ends, so does the run.
    """

    def __init__(self, folder: Path, tied: bool) -> None:
        self._down, self._tied = folder / DOWN, tied
        self._before = stamp(self._down)
        self._since: float | None = None
        self._reason = ""
        if tied:
            os.set_blocking(0, False)

    def __call__(self) -> str | None:
        """A reason to kill this host's ranks, once they have had time to end by themselves."""
        if self._since is None:
            if stamp(self._down) != self._before:
                self._reason = f"the part on {self._down.read_text().strip()} has failed; ending this host's"
            elif self._tied and _ended():
                self._reason = "the connection to the starter is gone; ending this host's part"
            else:
                return None
            self._since = time.monotonic()
        return self._reason if time.monotonic() - self._since >= GRACE_SECONDS else None

    def tell(self) -> None:
        """This host's part has failed."""
        self._down.parent.mkdir(exist_ok=True)
        part = self._down.with_name(f"down.{secrets.token_hex(4)}")
        part.write_text(socket.gethostname() + "\n")
        part.replace(self._down)


def _ended() -> bool:
    try:
        return os.read(0, 1 << 16) == b""
    except BlockingIOError:
        return False


def read_hostfile(path: Path) -> dict[str, int]:
    """Hosts and their ranks: lines "NAME slots=N", as DeepSpeed and MPI read them; "#" begins a comment.

    Raises:
        LaunchError: unreadable, a line that says something else, a host twice, or none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"cannot read the hostfile {path}: {error}") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, slots = words[0], words[1].removeprefix("slots=") if len(words) == 2 else ""
        if not (_HOST.fullmatch(name) and slots.isdecimal() and int(slots) > 0) or name in hosts:
            what = "names a host for the second time" if name in hosts else "is not like 'worker-1 slots=8'"
            raise LaunchError(f"{path}, line {number} {what}: {line.strip()!r}")
        hosts[name] = int(slots)
    if not hosts:
        raise LaunchError(f"{path} names no host; write lines like 'worker-1 slots=8'")
    return hosts


def ssh_options(environment: Mapping[str, str]) -> list[str]:
    """Ours after the user's own: of an option that is given twice, ssh takes the first."""
    return [*shlex.split(environment.get("PDSH_SSH_ARGS_APPEND", "")), *SSH_OPTIONS]


def ask_hosts(order: Order, run: Path, environment: Mapping[str, str]) -> int:
    """Ask every host whether it can take part. Returns a free port of the first.

    Raises:
        LaunchError: a host that cannot be reached, has another version or no such configuration, or does not see the
            run folder. All of them at once.
    """
    token = run / "launch" / f"seen.{secrets.token_hex(4)}"
    token.parent.mkdir(exist_ok=True)
    token.touch()
    here = shlex.join([f"PYTHONPATH={environment.get('PYTHONPATH', '')}", sys.executable])
    question = f"cd / && exec env {here} -m launch.node ask {order.word()} {shlex.quote(str(token.resolve()))}"
    options = ssh_options(environment)
    asked = {
        host: subprocess.Popen(
            ["ssh", *options, host, question],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in order.hosts
    }
    ports: list[int] = []
    problems: list[str] = []
    for host, process in asked.items():
        out, err = process.communicate()
        if process.returncode == 0:
            ports.append(int(out.split()[-1]))
        else:
            words = (err.strip() or f"exit code {process.returncode}").splitlines()[-1]
            problems.append(f"{host}: {words.removeprefix('sluice: ')}")
    token.unlink()
    if problems:
        raise LaunchError("not every host can take part:\n  " + "\n  ".join(problems))
    return ports[0]


def carried(environment: Mapping[str, str]) -> dict[str, str]:
    """What of the environment every host shall have. Nothing secret: a command line can be read by all users."""
    return {name: value for name, value in environment.items() if name.startswith(_CARRIED)}


def runner_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of DeepSpeed's multi-node runner.

    Raises:
        LaunchError: it would paste a value into a shell line that a shell would look into.
    """
    mine = {n: v for n, v in environment.items() if not n.startswith(_CARRIED) or n == "DS_ACCELERATOR"}
    for name, value in mine.items():
        if name.startswith(_EXPORTED) and re.search(r'["$`\\\n]', value):
            raise LaunchError(f"{name} has characters that a shell on another host would interpret: {value!r}")
    if not _WORD.fullmatch(sys.executable):
        raise LaunchError(f"the path of Python has characters that a shell would interpret: {sys.executable!r}")
    mine["DS_ENV_FILE"] = os.devnull  # else it would paste the lines of any .deepspeed_env that happens to be there
    mine["PDSH_SSH_ARGS_APPEND"] = shlex.join(ssh_options(environment))
    return mine


def runner_command(order: Order, hostfile: str) -> list[str]:
    """DeepSpeed's multi-node runner: one :mod:`launch.node` on every host.

    Args:
        order: what it shall do.
        hostfile: the same hosts with one slot each.
    """
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--log_level=error", "--launcher=pdsh"),
        *(f"--hostfile={hostfile}", "--force_multi", "--no_ssh_check"),
        *(f"--master_addr={order.hosts[0]}", f"--master_port={order.port}"),
        *("--no_local_rank", "--module", "launch.node", "run", order.word()),
    ]


@contextmanager
def hostfile_of(names: Sequence[str], slots: Sequence[int]) -> Generator[str]:
    """Path of a temporary hostfile for DeepSpeed."""
    with tempfile.NamedTemporaryFile("w", prefix="sluice-hosts-", encoding="utf-8") as file:
        file.writelines(f"{name} slots={count}\n" for name, count in zip(names, slots, strict=True))
        file.flush()
        yield file.name
