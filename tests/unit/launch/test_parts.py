"""A run on several hosts, seen from each: who is asked, what each starts, and what it tells the others."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from launch import hosts, local, node, supervise
from launch.hosts import DOWN, Order, Part, ask_hosts, carried, ssh_options
from launch.local import deepspeed_part, train_hosts, train_part
from pipeline.config.load import load_run
from pipeline.core.errors import LaunchError
from pipeline.core.files import stamp
from pipeline.record.lock import RunLock
from tests.integration.runs import SMOKE

CONFIG = SMOKE / "mae.toml"


def order_of(folder: Path, *names: str, **values) -> Order:
    facts = {"overrides": [], "slots": [8] * len(names), "port": 0, "environment": {}} | values
    return Order(str(folder), str(CONFIG), hosts=list(names), **facts)


def command(folder: Path, name: str, shell: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{shell}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """Asks this machine instead, which "blind" finds without the run folder; "gone" is not there."""
    shell = """
        while [ "$1" = -o ]; do shift 2; done
        case "$1" in
          gone) echo "ssh: connect to host gone port 22: No route to host" >&2; exit 255 ;;
          blind) exec sh -c "$(printf %s "$2" | sed "s#/launch/seen#/launch/unseen#")" ;;
          other) echo 1 ;;
          *) exec sh -c "$2" ;;
        esac"""
    command(tmp_path / "bin", "ssh", shell)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")


def test_the_port_is_one_that_is_free_on_the_first_host(tmp_path, ssh):
    run = tmp_path / "a 'run'; $(touch oops)"
    run.mkdir()
    port = ask_hosts(order_of(tmp_path, "here", "other"), run, dict(os.environ))
    with socket.create_server(("", port)):
        assert port > 1024
    assert list((run / "launch").iterdir()) == [] and not list(tmp_path.glob("**/oops"))


def test_all_hosts_that_cannot_take_part_are_named(tmp_path, ssh):
    with pytest.raises(LaunchError) as caught:
        ask_hosts(order_of(tmp_path, "here", "gone", "blind"), tmp_path, dict(os.environ))
    first, *lines = str(caught.value).splitlines()
    assert first == "not every host can take part:"
    assert [line.split(":")[0].strip() for line in lines] == ["gone", "blind"]
    assert "No route to host" in lines[0] and f"the run folder {tmp_path} is not the same here" in lines[1]
    assert list((tmp_path / "launch").iterdir()) == []
    with pytest.raises(LaunchError, match="here: no folder /no/where here"):
        ask_hosts(order_of(Path("/no/where"), "here"), tmp_path, dict(os.environ))


def test_a_host_that_cannot_read_the_configuration_says_so_before_anything_is_started(tmp_path, monkeypatch, capsys):
    seen = tmp_path / "launch" / "seen"
    seen.parent.mkdir()
    seen.touch()
    order = replace(order_of(tmp_path, "here"), config=str(tmp_path / "none.toml"))
    monkeypatch.setattr(sys, "argv", ["node", "ask", order.word(), str(seen)])
    monkeypatch.chdir(tmp_path)
    assert node.main() == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("sluice: ") and "none.toml" in err and err.count("\n") == 1


def test_a_host_forgets_what_its_launcher_thinks_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    launched = {"RANK": "1", "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0", "NCCL_TEST": "old"}
    found = {}

    def stand_in(config, path, overrides, part, *, tied):
        found.update(part=part, tied=tied, overrides=overrides, folder=os.getcwd(), environment=dict(os.environ))
        return found["code"]

    monkeypatch.setattr(local, "train_part", stand_in)
    values = {"slots": [8, 4], "port": 7, "environment": {"NCCL_TEST": "new"}, "overrides": ["run.seed=3"]}
    for code, expected in {0: 0, 75: 0, 1: 1, 70: 70}.items():  # saved is no failure: the runner would end the others
        found["code"] = code
        with patch.dict(os.environ, launched):  # which brings back what is taken out, too
            assert node.run(order_of(tmp_path, "h1", "h2", **values)) == expected
    assert found["part"] == Part(1, (8, 4), "h1", 7, "h1") and found["tied"]
    assert found["folder"] == str(tmp_path) and list(found["overrides"]) == ["run.seed=3"]
    assert found["environment"]["NCCL_TEST"] == "new"
    assert not {"RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES"} & set(found["environment"])


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Start a part whose ranks end with a status at once; environments that they had are in the list."""
    environments = []
    config = load_run(CONFIG, [f"run.folder='{tmp_path}'"])

    def start(number: int, status: int, port: int = 0, **more) -> int:
        def stand_in(command, folder, environment, watch, working_folder=None):
            environments.append(dict(environment))
            return status

        for module in (local, supervise):
            monkeypatch.setattr(module, "run_session", stand_in)
        monkeypatch.setattr(local, "interface", lambda part: "eth7")
        return train_part(config, CONFIG, [], Part(number, (1, 1), "h0", port, "h0"), **more)

    start.environments = environments
    return start


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [(0, 0, False), (75, 75, False), (1, 1, True), (2, 2, True), (70, 70, True), (-9, 1, True), (137, 1, True)],
)
def test_the_others_are_told_of_a_part_that_has_failed(tmp_path, started, status, code, told):
    assert started(1, status) == code
    assert (tmp_path / DOWN).exists() == told


def test_the_first_host_speaks_for_the_run(tmp_path, started):
    assert started(0, 0) == 1, "no rank has said that it finished"
    assert (tmp_path / DOWN).exists()


def test_only_the_first_host_looks_at_the_port(started):
    with socket.create_server(("", 0)) as squatter:
        port = squatter.getsockname()[1]
        with pytest.raises(LaunchError, match="cannot be taken"):
            started(0, 0, port)
        assert started(1, 0, port) == 0


def test_only_who_starts_a_run_says_what_an_earlier_one_was_asked(tmp_path, started, monkeypatch):
    (tmp_path / "stop").touch()
    started(1, 0)
    started(0, 0)
    monkeypatch.setenv("SLUICE_OLD_STOP", "the starter's")
    started(0, 0, tied=True)
    assert (tmp_path / "stop").exists()
    said = [environment.get("SLUICE_OLD_STOP") for environment in started.environments]
    assert said == [None, stamp(tmp_path / "stop"), "the starter's"]


def test_gloo_is_told_the_interface_unless_the_user_has(started, monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    started(1, 0)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    started(1, 0)
    assert [e["GLOO_SOCKET_IFNAME"] for e in started.environments] == ["eth7", "mine"]


def test_a_part_starts_ranks_on_the_devices_of_its_own_host():
    part = Part(1, (3, 2), "h0", 7, "h0")
    with deepspeed_part("m", ["a b"], part, {"CUDA_VISIBLE_DEVICES": "4,6,7"}) as words:
        assert {"--no_ssh", "--node_rank=1", "--master_addr=h0", "--master_port=7"} <= set(words)
        assert "--include=node-0:0,1,2@node-1:4,6" in words and words[-3:] == ["--module", "m", "a b"]
        (path,) = [word.removeprefix("--hostfile=") for word in words if word.startswith("--hostfile=")]
        # The launcher refuses a device beyond the slots of a host.
        assert Path(path).read_text() == "node-0 slots=3\nnode-1 slots=7\n"
    with deepspeed_part("m", [], part, {"DS_ACCELERATOR": "cpu"}) as words:
        assert "--include=node-0:0,1,2@node-1:0,1" in words


def test_a_hostfile_becomes_one_process_on_each_host(tmp_path, monkeypatch):
    (tmp_path / "hosts").write_text("h1 slots=8\nh2 slots=4\n")
    command(tmp_path / "bin", "pdsh", "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("NCCL_TEST", "x")
    (tmp_path / "stop").touch()
    found = {}

    def stand_in(words, folder, environment, working_folder):
        (path,) = [word.removeprefix("--hostfile=") for word in words if word.startswith("--hostfile=")]
        found.update(order=Order.read(words[-1]), hostfile=Path(path).read_text(), folder=working_folder, words=words)
        return 75

    monkeypatch.setattr(local, "supervise", stand_in)
    monkeypatch.setattr(local, "ask_hosts", lambda order, folder, environment: 4321)
    config = load_run(CONFIG, [f"run.folder='{tmp_path}'"])
    assert train_hosts(config, CONFIG, ["run.seed=3"], tmp_path / "hosts") == 75
    order = found["order"]
    assert (order.hosts, order.slots, order.port, order.overrides) == (["h1", "h2"], [8, 4], 4321, ["run.seed=3"])
    assert order.folder == os.getcwd() and order.environment["NCCL_TEST"] == "x"
    assert found["hostfile"] == "h1 slots=1\nh2 slots=1\n" and "--master_port=4321" in found["words"]
    assert found["folder"] == "/", "where no .deepspeed_env lies about"
    assert order.environment["SLUICE_OLD_STOP"] == stamp(tmp_path / "stop")


def test_no_secret_is_carried_to_another_host():
    environment = {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4", "AWS_SECRET_ACCESS_KEY": "x", "MY_NCCL_": "y"}
    assert carried(environment) == {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4"}


def test_the_users_own_options_of_ssh_come_first():
    own = ssh_options({"PDSH_SSH_ARGS_APPEND": "-o ConnectTimeout=99 -i '/a key'"})
    assert own[:4] == ["-o", "ConnectTimeout=99", "-i", "/a key"] and "ConnectTimeout=10" in own
    assert "BatchMode=yes" in own, "a question would wait for ever"


def test_a_port_that_waits_for_its_last_packets_is_free():
    """As after a crash: a run that starts again at once finds its own connections still closing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = server.accept()
            accepted.close()  # who closes first waits
            assert client.recv(1) == b""
    hosts.check_port(hosts.by_hand(f"h1:{port}", 1, 0, 1))


def test_hosts_are_numbered_from_0():
    with pytest.raises(LaunchError, match="--node-rank -1 is not one of 0 to 1"):
        hosts.by_hand("h1", 2, -1, 1)


def test_a_folder_in_use_is_left_as_it_is(tmp_path, started):
    held = RunLock(tmp_path)
    held.take()
    (tmp_path / "stop").touch()
    with pytest.raises(LaunchError, match="in use by process"):
        started(0, 0)
    assert (tmp_path / "stop").exists() and not started.environments
    held.release()
