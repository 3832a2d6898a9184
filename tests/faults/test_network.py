"""Two hosts that a cable joins: trained on over ssh and by hand, cut apart, killed, and with the port taken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.record.beats import read_beats
from tests.faults.launched import ZERO
from tests.faults.network import ROOT, Hosts, missing, two_hosts
from tests.integration.runs import codes, metrics, overrides, run

REASON = missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
CONFIG = str(ROOT / "configs" / "smoke" / "supervised.toml")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    folder = tmp_path_factory.mktemp("hosts")
    with two_hosts(folder) as found:
        (folder / "hostfile").write_text("".join(f"{a} slots=1  # one rank\n" for a in found.addresses))
        yield found


@pytest.fixture(autouse=True)
def nobody_is_left(hosts: Hosts) -> Iterator[None]:
    """After each test, whatever it did, nothing runs on either host."""
    yield
    left = hosts.processes()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def words(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def over_ssh(hosts: Hosts, settings: list[str]) -> subprocess.Popen[bytes]:
    return hosts.sluice(0, "train", CONFIG, "--hostfile", "hostfile", *words(settings))


def by_hand(hosts: Hosts, settings: list[str], port: int = 29511) -> list[subprocess.Popen[bytes]]:
    master = f"{hosts.addresses[0]}:{port}"
    each = ["train", CONFIG, "--nodes", "2", "--master", master, *words(settings)]
    return [hosts.sluice(i, *each, "--node-rank", str(i), log=f"out{i}") for i in (0, 1)]


def wait_for(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.1)


def step(folder: Path) -> int:
    """Last step that was logged."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def state(folder: Path) -> dict[str, object]:
    return json.loads((folder / "state.json").read_text())


def digests(folder: Path) -> list[str]:
    found = metrics(folder)
    assert sorted(found) == list(range(1, len(found) + 1))
    return [found[number]["data_digest"] for number in sorted(found)]


ODD = 'it\'s $(touch oops) "x"; `touch oops` | y'
"""A name that a shell would have much to say about."""


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_over_ssh_from_one_host_and_stopped_from_there(hosts, glyphs, tmp_path):
    folder = tmp_path / ODD
    settings = overrides(folder, glyphs / "train", *ZERO, "run.length=100000ba", "every.checkpoint=0ba")
    settings[0] = f"run.folder={json.dumps(str(folder))}"
    starter = over_ssh(hosts, settings)
    wait_for(lambda: step(folder) >= 3 or starter.poll() is not None, "training")
    starter.send_signal(signal.SIGTERM)
    assert starter.wait(timeout=60) == 75
    assert state(folder)["outcome"] == "requeue"
    assert [beat.rank for beat in read_beats(folder)] == [0, 1]
    assert not (ROOT / "oops").exists() and not list(hosts.folder.glob("**/oops")) and not Path("/oops").exists()
    assert "=== rank 1" in (folder / "logs" / "rank-00001.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_rank_killed_on_one_host_ends_both_started_by_hand(hosts, glyphs, tmp_path):
    folder = tmp_path / "run"
    settings = overrides(folder, glyphs / "train", *ZERO, "run.length=100000ba", "every.checkpoint=0ba")
    processes = by_hand(hosts, settings)
    wait_for(lambda: step(folder) >= 3 or any(p.poll() is not None for p in processes), "training")
    os.kill(read_beats(folder)[1].pid, signal.SIGKILL)
    assert [p.wait(timeout=30) for p in processes] == [1, 1]
    assert state(folder)["outcome"] == "failed"
    assert (folder / "launch" / "down").exists()


@pytest.mark.fault(13, "the master's port is taken")
def test_port_of_the_master_taken(hosts, glyphs, tmp_path, fault_row):
    listen = "import socket; s = socket.create_server(('', 29512)); print('up', flush=True); input()"
    command = hosts.inside(hosts.names[0], sys.executable, "-c", listen)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as squatter:
        assert squatter.stdout is not None and squatter.stdout.readline() == b"up\n"
        began = time.monotonic()
        settings = overrides(tmp_path / "run", glyphs / "train", *ZERO)
        master = f"{hosts.addresses[0]}:29512"
        first = hosts.sluice(0, "train", CONFIG, "--nodes", "2", "--master", master, *words(settings), log="taken")
        assert first.wait(timeout=60) == 2
        fault_row.seconds, fault_row.until = time.monotonic() - began, "stopped"
        squatter.communicate(b"\n")
    said = (hosts.folder / "taken").read_text()
    assert f"port 29512 of {hosts.addresses[0]} cannot be taken" in said and "--master" in said
    assert "Traceback" not in said
    fault_row.case = "2 hosts, by hand; over ssh a free one is asked for"
    fault_row.outcome = "exit 2, names the port"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.fault(5, "the link between two hosts is cut")
def test_link_cut(hosts, glyphs, tmp_path, fault_row):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    length, every = "run.length=400ba", "every.checkpoint=10ba"
    assert codes(run(1, "supervised", overrides(whole, glyphs / "train", *ZERO, length, every))) == [0]

    settings = overrides(folder, glyphs / "train", *ZERO, length, every, "engine.timeout_minutes=0.5")
    starter = over_ssh(hosts, settings)
    wait_for(lambda: step(folder) >= 15 or starter.poll() is not None, "training")
    hosts.cable("down")
    cut = time.monotonic()
    assert starter.wait(timeout=90) == 1
    wait_for(lambda: not hosts.processes(), "end of all ranks", 90)
    stopped = time.monotonic() - cut
    reached = step(folder)
    assert 15 <= reached < 400

    hosts.cable("up")
    mended = time.monotonic()
    starter = over_ssh(hosts, settings)
    wait_for(lambda: max((b.step for b in read_beats(folder) if b.attempt == 1), default=0) > 0, "next step")
    fault_row.seconds = stopped + time.monotonic() - mended
    assert starter.wait(timeout=120) == 0
    assert digests(folder) == digests(whole)
    fault_row.case = "2 hosts, over ssh, ZeRO 1; collectives time out after 30 s"
    fault_row.outcome = f"all ranks and the starter gone after {stopped:.0f} s; started again: same batches"
