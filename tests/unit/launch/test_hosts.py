import os
import socket
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import hosts
from launch.hosts import Order, Others, Part, by_hand, check_port, interface, read_hostfile, runner_environment
from pipeline.core.errors import LaunchError


@pytest.fixture
def hostfile(tmp_path):
    def write(text):
        (tmp_path / "hosts").write_text(text)
        return tmp_path / "hosts"

    return write


def test_hostfile(hostfile):
    text = "# ours\nworker-1 slots=8\n\n  10.0.0.2\tslots=4 # the old one\nfe80::1 slots=1\n"
    assert read_hostfile(hostfile(text)) == {"worker-1": 8, "10.0.0.2": 4, "fe80::1": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("a slots=1\nb\n", r"line 2 is not like 'worker-1 slots=8': 'b'"),
        ("a slots=0", "line 1 is not like"),
        ("a slots=two", "line 1 is not like"),
        ("a slots=1 max=2", "line 1 is not like"),
        ("-oProxyCommand=x slots=1", "line 1 is not like"),
        ("a[1-3] slots=1", "line 1 is not like"),
        ("a,b slots=1", "line 1 is not like"),
        ("a slots=1\na slots=2", "line 2 names a host for the second time"),
    ],
)
def test_hostfile_with_a_mistake(hostfile, text, message):
    with pytest.raises(LaunchError, match=message):
        read_hostfile(hostfile(text))


def test_hostfile_that_is_not_there(tmp_path):
    with pytest.raises(LaunchError, match="cannot read the hostfile"):
        read_hostfile(tmp_path / "none")


@given(st.lists(st.text()), st.dictionaries(st.text(), st.text()))
def test_an_order_is_one_word_without_special_characters(overrides, environment):
    order = Order("/some where", "a 'b'.toml", overrides, ["h1", "h2"], [1, 2], 7, environment)
    assert set(order.word()) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")
    assert Order.read(order.word()) == order


def test_the_part_of_each_host():
    order = Order("/", "c", [], ["h1", "h2", "h3"], [1, 2, 3], 7, {})
    assert order.part(0) == Part(0, (1, 2, 3), "h1", 7, "h2")
    assert order.part(2) == Part(2, (1, 2, 3), "h1", 7, "h1")


@pytest.mark.parametrize(
    ("master", "address", "port"),
    [("h1", "h1", 29500), ("h1:7", "h1", 7), ("[fe80::1]:7", "fe80::1", 7), ("10.0.0.1:65535", "10.0.0.1", 65535)],
)
def test_by_hand(master, address, port):
    assert by_hand(master, 3, 2, 4) == Part(2, (4, 4, 4), address, port, address)


@pytest.mark.parametrize(
    ("master", "node", "message"),
    [("h:0", 0, "is not a port"), ("h:x", 0, "is not a port"), ("h:65536", 0, "is not a port"), ("h", 3, "0 to 2")],
)
def test_by_hand_with_a_mistake(master, node, message):
    with pytest.raises(LaunchError, match=message):
        by_hand(master, 3, node, 1)


def test_a_port_that_somebody_listens_at():
    with socket.create_server(("", 0)) as squatter:
        port = squatter.getsockname()[1]
        with pytest.raises(LaunchError, match=rf"port {port} of h1 cannot be taken.*--master h1:PORT"):
            check_port(by_hand(f"h1:{port}", 1, 0, 1))
    check_port(by_hand(f"h1:{port}", 1, 0, 1))


def test_the_loopback_is_no_way_to_another_host():
    assert interface(by_hand("127.0.0.1", 1, 0, 1)) == "lo"
    with pytest.raises(LaunchError, match="loopback"):
        interface(by_hand("127.0.0.1", 2, 0, 1))


def test_a_host_that_nobody_knows():
    with pytest.raises(LaunchError, match=r"nowhere\.invalid is not known here"):
        interface(by_hand("nowhere.invalid", 2, 1, 1))


def test_the_others_have_time_to_end_by_themselves(tmp_path, monkeypatch):
    others, another = Others(tmp_path, tied=False), Others(tmp_path, tied=False)
    assert others() is None
    another.tell()
    assert others() is None  # seen, but it waits
    monkeypatch.setattr(hosts, "GRACE_SECONDS", 0.0)
    assert others() == f"the part on {socket.gethostname()} has failed; ending this host's"
    assert Others(tmp_path, tied=False)() is None  # of an earlier attempt


@pytest.mark.parametrize("gone", [True, False])
def test_a_tied_host_ends_with_its_connection(tmp_path, gone):
    code = (
        "import sys; from pathlib import Path; from launch import hosts; hosts.GRACE_SECONDS = 0.0\n"
        "print(hosts.Others(Path(sys.argv[1]), tied=True)())"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    read, write = os.pipe()
    if gone:
        os.close(write)
    said = subprocess.run(command, stdin=read, capture_output=True, text=True, check=True).stdout
    assert ("connection to the starter is gone" in said) == gone
    os.close(read)
    if not gone:
        os.close(write)


def test_nothing_that_a_shell_would_look_into_reaches_the_runner():
    clean = {"PATH": "/bin:/usr/bin", "HOME": "/root", "NCCL_X": "$(x)", "SECRET": "$(x)"}
    mine = runner_environment(clean)
    assert "NCCL_X" not in mine  # it is in the order instead
    assert mine["DS_ENV_FILE"] == os.devnull and "ServerAliveInterval" in mine["PDSH_SSH_ARGS_APPEND"]
    for name in ("PYTHONPATH", "PATH", "LD_LIBRARY_PATH"):
        with pytest.raises(LaunchError, match=f"{name} has characters"):
            runner_environment(clean | {name: "/a:$(touch x)"})
