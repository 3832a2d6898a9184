"""Two hosts on this machine: network namespaces that a virtual cable joins, each with an ssh server of its own."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDED = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh"}


def missing() -> str | None:
    """Why there can be no such hosts here; None when there can."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    absent = [package for command, package in NEEDED.items() if shutil.which(command, path=path) is None]
    if absent:
        return f"needs {', '.join(absent)} (.ci/run installs them)"
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    probe = f"sluice-probe-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
        return "may not make network namespaces here"
    ip("netns", "del", probe)
    return None


def ip(*words: str) -> None:
    """The command of iproute2."""
    subprocess.run(["ip", *words], check=True)


class Hosts:
    """Two hosts, "10.77.N.1" and "10.77.N.2"."""

    def __init__(self, folder: Path) -> None:
        number = os.getpid() % 250
        self.folder = folder
        self.names = [f"sluice{number}-{i}" for i in (1, 2)]
        self.addresses = [f"10.77.{number}.{i}" for i in (1, 2)]
        self.servers: list[subprocess.Popen[bytes]] = []

    def build(self, stack: ExitStack) -> None:
        """Make the namespaces, the cable and the servers; ``stack`` takes them away."""
        stack.callback(self.clear)
        first, second = self.names
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        key = self.folder / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        shutil.copy(self.folder / "key.pub", self.folder / "authorized")
        Path("/run/sshd").mkdir(exist_ok=True)
        for name, address in zip(self.names, self.addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for link in ("lo", "cable"):
                ip("-n", name, "link", "set", link, "up")
            self.servers.append(subprocess.Popen(self.inside(name, *self.server(key, address))))

    def server(self, key: Path, address: str) -> list[str]:
        """An ssh server that stays in the foreground and reads no file of this machine."""
        options = {
            "ListenAddress": address,
            "HostKey": key,
            "PidFile": "none",
            "AuthorizedKeysFile": self.folder / "authorized",
            "StrictModes": "no",
            "UsePAM": "no",
            "PasswordAuthentication": "no",
        }
        words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        return ["/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", *words]

    def inside(self, name: str, *command: str) -> list[str]:
        """``command`` in one of the namespaces."""
        return ["ip", "netns", "exec", name, *command]

    def sluice(self, host: int, *arguments: str, log: str = "out") -> subprocess.Popen[bytes]:
        """`sluice` on a host; what it prints goes to the file ``log`` in the folder."""
        ssh = ["-i", str(self.folder / "key"), "-F", "/dev/null", "-o", "LogLevel=ERROR"]
        ssh += ["-o", "UserKnownHostsFile=/dev/null", "-o", "StrictHostKeyChecking=no"]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PDSH_SSH_ARGS_APPEND": shlex.join(ssh),
        }
        command = self.inside(self.names[host], sys.executable, "-m", "launch", *arguments)
        with open(self.folder / log, "ab") as file:
            return subprocess.Popen(
                command, env=environment, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )

    def cable(self, state: str) -> None:
        """ "down" cuts the link, "up" mends it."""
        ip("-n", self.names[0], "link", "set", "cable", state)

    def processes(self) -> dict[int, str]:
        """Whatever runs on the hosts but their ssh servers: process ids and command lines."""
        found = {}
        for name in self.names:
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
            for pid in map(int, listed.split()):
                try:
                    line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                if line and "sshd" not in line:
                    found[pid] = line
        return found

    def clear(self) -> None:
        """Take everything away, whatever state it is in."""
        for server in self.servers:
            server.kill()
            server.wait()
        for name in self.names:
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
            for pid in map(int, listed.split()):
                os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Two hosts, as long as the context lasts."""
    with ExitStack() as stack:
        hosts = Hosts(folder)
        hosts.build(stack)
        yield hosts
